"""Command line of the analysis: `python -m analysis COMMAND`; turns mistakes into one message and exit status 2."""

import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from trainer import names
from trainer.errors import UserError
from trainer.options import Commands, OneOf, all_of, never_refuse

EXIT_USER, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141


def _empty_is_default(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """`mlflow run` passes an empty text for a parameter that was not given."""
    return value if value != "" else parameter.get_default(context)


_option = partial(click.option, callback=_empty_is_default)

_experiment = _option(
    "--experiment",
    metavar="NAME",
    show_default="every run with a strategy",
    help="Only runs of this MLflow experiment.",
)
_where = _option("--where", metavar="FILTER", help="Only runs for which this holds: \"params.tuner.lora_rank = '16'\".")
_by = _option(
    "--by",
    metavar="METRIC",
    default=names.EVAL_LOSS_SMOOTHED,
    show_default=True,
    help="Metric to rank by, under the name that it has in MLflow.",
)
_at = _option(
    "--at",
    metavar="[final|best|samples=N|tokens=N|seconds=N]",
    default="final",
    show_default=True,
    help="Where in a run it is read; best: at its lowest eval loss.",
)
_axis = _option(
    "--axis",
    type=OneOf(["steps", "samples", "tokens", "epochs", "hours"]),
    show_default="samples where arms take different numbers in a step, else steps",
    help="What runs along x.",
)
_local = click.option("--local", is_flag=True, help="Write files only; MLflow stays as it is.")
_runs = all_of(_experiment, _by, _where)


_HELP = """
\b
python -m analysis rank                       every run with a strategy, seeds pooled
python -m analysis rank --at samples=1000     at equal samples, where accumulation differs
python -m analysis plot                       curves, gaps, loss against cost as PNG and SVG
python -m analysis report                     report.md and report.html, also in MLflow
python -m analysis gallery                    images, truth and every arm's answer side by side
python -m analysis promote                    the winner's checkpoint into the Model Registry
python -m analysis import_published           the comparison that started this, as MLflow runs
python -m analysis import_tensorboard runs/   event files of earlier experiments, as MLflow runs
"""
_RANK_HELP = """
\b
python -m analysis rank
python -m analysis rank --by eval/loss --at samples=1000 --format markdown
python -m analysis rank --where "params.tuner.lora_rank = '16'"
python -m analysis rank --each --format csv             a row a run, for a spreadsheet
"""
_PLOT_HELP = """
\b
python -m analysis plot
python -m analysis plot --by eval/loss --axis hours --out figures
"""
_REPORT_HELP = """
\b
python -m analysis report
python -m analysis report --by eval/loss --axis samples --points 250,500,1000
python -m analysis report --experiment stage_3_vision_comparison --out report --local
"""
_PROMOTE_HELP = """
\b
python -m analysis promote
python -m analysis promote --by eval/loss --anyway      although it cannot be told from the second
python -m trainer predict models:/qwen3vl-vision@champion photos/
"""
_GALLERY_HELP = """
\b
python -m analysis gallery
python -m analysis gallery --seed 17 --records 50 --out gallery.html --local
"""
_PUBLISHED_HELP = """
\b
python -m analysis import_published
python -m analysis rank --experiment published
"""
_TENSORBOARD_HELP = """
\b
python -m analysis import_tensorboard runs/
python -m analysis rank --experiment tensorboard
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
def cli() -> None:
    """Compare what was trained: rank strategies and say how sure that is.

    The MLflow store is that of MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db in the current folder.
    """


@cli.command(epilog=_RANK_HELP, short_help="Rank strategies and say how sure that is.")
@_runs
@_at
@_option(
    "--format",
    "form",
    type=OneOf(["table", "markdown", "csv", "json"]),
    default="table",
    show_default=True,
    help="What is printed.",
)
@click.option("--each", is_flag=True, help="A row a run, instead of a row an arm with its seeds pooled.")
def rank(experiment: str | None, by: str, where: str | None, at: str, form: str, each: bool) -> None:
    """Rank strategies: means over seeds with 95 % intervals, margins, and which differences are distinguishable.

    Only runs that FINISHED and passed the training gate are ranked; the others are listed with the reason. Runs of one
    strategy that were configured differently are different arms. Arms are compared pairwise, paired by seed where
    seeds are shared, with Holm's correction over all pairs.
    """
    from analysis import tables
    from analysis.ranking import parse_at
    from analysis.reading import read_ranking
    from analysis.store import Store

    ranking = read_ranking(Store(), experiment, where, by, parse_at(at), each=each)
    if form == "table":
        tables.render(ranking, _console())
    else:
        click.echo(tables.FORMATS[form](ranking), nl=False)


@cli.command(epilog=_PLOT_HELP, short_help="Draw what is ranked, as PNG and SVG.")
@_runs
@_at
@_axis
@_option("--out", metavar="FOLDER", default="output/figures", show_default=True, help="Where figures are written.")
def plot(experiment: str | None, by: str, where: str | None, at: str, axis: str | None, out: str) -> None:
    """Draw what is ranked, as PNG and SVG: curves, gaps, loss against cost, loss by domain, sweeps.

    Runs are thin lines, their mean over seeds a thick one, and a band reaches from the lowest seed to the highest. An
    arm has one colour, line and marker in every figure.
    """
    from analysis import plots
    from analysis.comparison import default_axis
    from analysis.ranking import parse_at
    from analysis.reading import read_comparison
    from analysis.store import Store

    comparison = read_comparison(Store(), experiment, where, by, parse_at(at))
    for path in plots.draw(comparison, Path(out), axis or default_axis(comparison.ranking)):
        click.echo(path)
    for run, reason in comparison.ranking.excluded:
        click.echo(f"not drawn: {run.name or run.id} {reason}", err=True)


@cli.command(epilog=_REPORT_HELP, short_help="Write the report on a comparison.")
@_runs
@_at
@_axis
@_option("--points", metavar="N,N,...", show_default="round numbers", help="Where on that axis curves are told.")
@_option("--out", metavar="FOLDER", default="output/report", show_default=True, help="Where the report is written.")
@_local
def report(  # click's options say what they are
    experiment: str | None, by: str, where: str | None, at: str, axis: str | None, points: str | None, out: str,
    local: bool,
) -> None:  # fmt: skip
    """Write the report on a comparison: report.md, and report.html with all pictures inside.

    What was compared and what differs, metrics, curves, depth x method, domains, how sure it is, what a careful reader
    notices, a recommendation with its confidence, what to run next, and how to run it again. Both become artifacts of
    the comparison's parent run in MLflow, or of a run that is made to hold them.
    """
    from analysis.comparison import parse_points
    from analysis.ranking import parse_at
    from analysis.reading import read_comparison
    from analysis.report import log, write
    from analysis.store import Store

    told, store, folder = parse_points(points) if points else [], Store(), Path(out)
    comparison = read_comparison(store, experiment, where, by, parse_at(at))
    files = write(store, comparison, folder, axis, told)
    click.echo(f"{files[0]}\n{files[1]}")
    if not local:
        click.echo(f"in MLflow: artifacts `report` of run {log(store, comparison.ranking, files)}")


@cli.command(epilog=_PROMOTE_HELP, short_help="Register the winner's checkpoint as models:/NAME@ALIAS.")
@_runs
@_at
@_option("--name", metavar="NAME", default="qwen3vl-vision", show_default=True, help="Registered model.")
@_option("--alias", metavar="NAME", default="champion", show_default=True, help="Alias of its new version.")
@click.option("--anyway", is_flag=True, help="Also where the winner is not distinguishable from the second.")
def promote(experiment: str | None, by: str, where: str | None, at: str, name: str, alias: str, anyway: bool) -> None:
    """Register the winner's best checkpoint in the MLflow Model Registry, under an alias that says: use this one.

    Of the winner's seeds, the run with the best value is taken. Refused where the winner is not distinguishable from
    the second: then nothing says that it is better.
    """
    from analysis.champion import promote as promoted
    from analysis.ranking import parse_at
    from analysis.reading import read_ranking
    from analysis.store import Store

    store = Store()
    version, best = promoted(
        store, read_ranking(store, experiment, where, by, parse_at(at)), name, alias, anyway=anyway
    )
    click.echo(f"models:/{name}@{alias} is version {version}: {best.run.name} ({best.run.id})")


@cli.command(epilog=_GALLERY_HELP, short_help="Show images with the truth and each arm's answer.")
@_runs
@_option("--seed", metavar="N", show_default="the lowest that all arms share", help="Seed of the runs that are shown.")
@click.option(
    "--records", metavar="N", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Images at most."
)
@_option(
    "--val_jsonl",
    metavar="FILE",
    show_default="where they were in training",
    help="Where the validation records are now.",
)
@_option("--out", metavar="FILE", default="output/gallery.html", show_default=True, help="HTML page to write.")
@_local
def gallery(
    experiment: str | None, by: str, where: str | None, seed: str | None, records: int, val_jsonl: str | None, out: str,
    local: bool,
) -> None:  # fmt: skip
    """Show validation images with the truth and each arm's answer side by side, on one page.

    Answers are those that the runs have kept (tracking.generate_records); nothing is generated anew. What arms disagree
    on most comes first; tabs choose a domain. The page holds its images and becomes an artifact of the comparison's
    parent run in MLflow.
    """
    from analysis.gallery import gather
    from analysis.gallery_page import page
    from analysis.ranking import parse_at
    from analysis.reading import read_ranking
    from analysis.report import log_page
    from analysis.store import Store

    store, path = Store(), Path(out)
    ranking = read_ranking(store, experiment, where, by, parse_at("final"))
    found = gather(store, ranking, seed=seed, val_jsonl=Path(val_jsonl) if val_jsonl else None, records=records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found), encoding="utf-8")
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{path}: {len(found.images)} images, {len(found.arms)} arms")
    if not local:
        click.echo(f"in MLflow: artifact `gallery/{path.name}` of run {log_page(store, ranking, path)}")


@cli.command("import_published", epilog=_PUBLISHED_HELP, short_help="Make MLflow runs of published results.")
@_option(
    "--experiment", metavar="NAME", default="published", show_default=True, help="MLflow experiment that they go to."
)
@_option(
    "--file", "path", metavar="FILE", show_default="all in experiments/published/", help="YAML file with the results."
)
def import_published(experiment: str, path: str | None) -> None:
    """Make MLflow runs of published results, tagged as published; a second import adds nothing."""
    from analysis.published import published_files, published_runs
    from analysis.store import Store

    paths = [Path(path)] if path else published_files()
    runs = [run for path in paths for run in published_runs(path)]
    _import(Store(create=True), runs, experiment)


@cli.command(
    "import_tensorboard", epilog=_TENSORBOARD_HELP, short_help="Make MLflow runs of TensorBoard's event files."
)
@click.argument("folder")
@_option(
    "--experiment", metavar="NAME", default="tensorboard", show_default=True, help="MLflow experiment that they go to."
)
def import_tensorboard(folder: str, experiment: str) -> None:
    """Make MLflow runs of the event files below FOLDER, a run a folder, with steps and wall times.

    The run's name, its path from FOLDER, becomes its strategy. A second import adds nothing but what is new.
    """
    from analysis.store import Store
    from analysis.tensorboard import tensorboard_runs

    _import(Store(create=True), tensorboard_runs(Path(folder)), experiment)


def _import(store: Any, runs: Iterable[Any], experiment: str) -> None:
    for run in runs:
        run_id, added = store.import_run(run, experiment)
        click.echo(f"{'imported' if added else 'already there'}: {run.name} ({run_id[:8]}) in {experiment}")


def _console() -> Console:
    """As wide as the terminal; a file or pipe gets lines that are not broken."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def main() -> NoReturn:
    """Run a command; the exit status says how it ended."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    never_refuse(sys.stdout)
    try:
        cli(prog_name="python -m analysis", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(0)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is tried again at the end
        sys.exit(EXIT_PIPE)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except OSError as error:  # a folder that is a file, or that nobody may write to
        where, got = str(error.filename or "a file"), error.strerror or str(error)
        told = UserError(where, got, "a file or folder that can be written", "choose another place: --out")
        click.echo(f"error: {told}", err=True)
        sys.exit(EXIT_USER)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()

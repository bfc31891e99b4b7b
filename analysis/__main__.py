"""Command line of the analysis: `python -m analysis COMMAND`; turns mistakes into one message and exit status 2."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from trainer import names
from trainer.errors import UserError

EXIT_USER, EXIT_INTERRUPTED = 2, 130


def _empty_is_none(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """`mlflow run` passes an empty text for a parameter that was not given."""
    return value if value != "" else parameter.get_default(context)


def _options(*options: Callable[[Any], Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_experiment = click.option(
    "--experiment", callback=_empty_is_none, help="Name of an MLflow experiment. [default: every run with a strategy]"
)
_where = click.option(
    "--where", callback=_empty_is_none, help="Only runs for which this holds: \"params.tuner.lora_rank = '16'\"."
)
_by = click.option(
    "--by",
    callback=_empty_is_none,
    default=names.EVAL_LOSS_SMOOTHED,
    show_default=True,
    help="Metric to rank by, under the name that it has in MLflow.",
)
_at = click.option(
    "--at",
    callback=_empty_is_none,
    default="final",
    show_default=True,
    help="Where in a run it is read: final, best (its lowest eval loss), samples=N, tokens=N or seconds=N.",
)


_axis = click.option(
    "--axis",
    callback=_empty_is_none,
    type=click.Choice(["steps", "samples", "tokens", "epochs", "hours", ""]),
    help="What runs along x. [default: samples where arms take different numbers in a step, else steps]",
)


_HELP = """
\b
python -m analysis rank                       every run with a strategy, seeds pooled
python -m analysis rank --at samples=1000     at equal samples, where accumulation differs
python -m analysis report                     report.md and report.html, also in MLflow
python -m analysis gallery                    images, truth and every arm's answer side by side
python -m analysis promote                    the winner's checkpoint into the Model Registry
python -m analysis import_published           the comparison that started this, as MLflow runs
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
def cli() -> None:
    """Compare what was trained: rank strategies and say how sure that is.

    The MLflow store is that of MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db.
    """


@cli.command()
@_options(_experiment, _by, _where, _at)
@click.option(
    "--format",
    "form",
    callback=_empty_is_none,
    type=click.Choice(["table", "markdown", "csv", "json", ""]),
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


@cli.command()
@_options(_experiment, _by, _where, _at, _axis)
@click.option("--out", callback=_empty_is_none, default="output/figures", show_default=True, help="Folder for them.")
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


@cli.command()
@_options(_experiment, _by, _where, _at, _axis)
@click.option(
    "--points", callback=_empty_is_none, help="Where curves are told: 500,1000,2000. [default: round numbers]"
)
@click.option("--out", callback=_empty_is_none, default="output/report", show_default=True, help="Folder for it.")
@click.option("--local", is_flag=True, help="Write the files only; MLflow stays as it is.")
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


@cli.command()
@_options(_experiment, _by, _where, _at)
@click.option("--name", callback=_empty_is_none, default="qwen3vl-vision", show_default=True, help="Registered model.")
@click.option("--alias", callback=_empty_is_none, default="champion", show_default=True, help="Of the version.")
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


@cli.command()
@_options(_experiment, _by, _where)
@click.option("--seed", callback=_empty_is_none, help="Of the runs shown. [default: the lowest that all arms share]")
@click.option("--records", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Images at most.")
@click.option("--val_jsonl", callback=_empty_is_none, help="Where the validation records are now.")
@click.option("--out", callback=_empty_is_none, default="output/gallery.html", show_default=True, help="The page.")
@click.option("--local", is_flag=True, help="Write the file only; MLflow stays as it is.")
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


@cli.command("import_published")
@click.option("--experiment", callback=_empty_is_none, default="published", show_default=True, help="Where they go.")
@click.option("--file", "path", callback=_empty_is_none, help="YAML file. [default: all in experiments/published/]")
def import_published(experiment: str, path: str | None) -> None:
    """Make MLflow runs of published results, tagged as published; a second import adds nothing."""
    from analysis.published import published_files, published_runs
    from analysis.store import Store

    paths = [Path(path)] if path else published_files()
    runs = [run for path in paths for run in published_runs(path)]
    _import(Store(create=True), runs, experiment)


@cli.command("import_tensorboard")
@click.argument("folder")
@click.option("--experiment", callback=_empty_is_none, default="tensorboard", show_default=True, help="Where they go.")
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
    try:
        cli(prog_name="python -m analysis", standalone_mode=False)
        sys.exit(0)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except OSError as error:  # a folder that is a file, or that nobody may write to
        click.echo(f"error: {error.filename or 'a file'}\n  got:     {error.strerror or error}", err=True)
        click.echo("  allowed: a place that can be written to\n  do:      give another --out", err=True)
        sys.exit(EXIT_USER)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()

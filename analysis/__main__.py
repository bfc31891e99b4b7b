"""Command line of the analysis: `python -m analysis COMMAND`; turns mistakes into one message and exit status 2."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from trainer import names
from trainer.errors import UserError

EXIT_USER, EXIT_INTERRUPTED = 2, 130

_CURVES_AT_ONCE = 200
"""Runs whose curves are held together: memory stays flat in the number of runs."""


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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    r"""Compare what was trained: rank strategies and say how sure that is.

    The MLflow store is that of MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db.

    \b
    python -m analysis rank                       every run with a strategy, seeds pooled
    python -m analysis rank --at samples=1000     at equal samples, where accumulation differs
    python -m analysis import_published           the comparison that started this, as MLflow runs
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
    from analysis.ranking import rank as ranked
    from analysis.store import Store

    place = parse_at(at)
    readings, excluded, n_not_finite = _read(Store(), experiment, where, by, place)
    ranking = ranked(readings, by, place, excluded, each=each, n_not_finite=n_not_finite)
    if form == "table":
        tables.render(ranking, _console())
    else:
        click.echo(tables.FORMATS[form](ranking), nl=False)


@cli.command()
@_options(_experiment, _by, _where, _at)
@click.option(
    "--axis",
    callback=_empty_is_none,
    type=click.Choice(["steps", "samples", "tokens", "epochs", "hours", ""]),
    help="What runs along x. [default: samples where arms take different numbers in a step, else steps]",
)
@click.option("--out", callback=_empty_is_none, default="output/figures", show_default=True, help="Folder for them.")
def plot(experiment: str | None, by: str, where: str | None, at: str, axis: str | None, out: str) -> None:
    """Draw what is ranked, as PNG and SVG: curves, gaps, loss against cost, loss by domain.

    Runs are thin lines, their mean over seeds a thick one, and a band reaches from the lowest seed to the highest. An
    arm has one colour, line and marker in every figure.
    """
    from analysis import plots
    from analysis.ranking import domain_losses, parse_at
    from analysis.ranking import rank as ranked
    from analysis.store import Store

    place, store = parse_at(at), Store()
    readings, excluded, _ = _read(store, experiment, where, by, place)
    ranking = ranked(readings, by, place, excluded)
    run_ids = [reading.run.id for row in ranking.rows for reading in row.readings]
    by_metric = {metric: store.curves(run_ids, metric) for metric in plots.CURVES_NEEDED}
    curves = {run_id: {metric: of_runs[run_id] for metric, of_runs in by_metric.items()} for run_id in run_ids}
    comparison = plots.Comparison(ranking, curves, domain_losses(ranking))
    for path in plots.draw(comparison, Path(out), axis or plots.default_axis(ranking)):
        click.echo(path)
    for run, reason in excluded:
        click.echo(f"not drawn: {run.name or run.id} {reason}", err=True)


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


def _read(store: Any, experiment: str | None, where: str | None, by: str, at: Any) -> tuple[list[Any], list[Any], int]:
    """Readings of the runs that can be ranked, the others with the reason, and how many points were not finite."""
    from analysis.ranking import CURVES, direction, read, why_excluded

    direction(by)  # a misspelt metric is told before anything is read
    readings: list[Any] = []
    excluded: list[Any] = []
    n_not_finite = 0
    found_runs = _with_progress(store.runs(experiment, where))
    while runs := list(islice(found_runs, _CURVES_AT_ONCE)):
        reasons = {run.id: why_excluded(run) for run in runs}
        excluded += [(run, reasons[run.id]) for run in runs if reasons[run.id]]
        good = [run for run in runs if reasons[run.id] is None]
        curves = {}
        if at.kind != "final":
            curves = {metric: store.curves([run.id for run in good], metric) for metric in {*CURVES, by}}
        for run in good:
            own = {metric: of_runs[run.id] for metric, of_runs in curves.items()}
            n_not_finite += sum(curve.n_not_finite for curve in own.values())
            found = read(run, by, at, own)
            if isinstance(found, str):
                excluded.append((run, found))
            else:
                readings.append(found)
    if not readings and not excluded:
        raise UserError(
            str(store),
            "no run with a strategy tag" + (" for which --where holds" if where else ""),
            "at least one run of this trainer",
            "train something first: mlflow run . -e last6_lora" if not where else "loosen --where",
        )
    if not readings and any(reason == f"has no {by}" for _, reason in excluded):
        raise UserError("--by", by, "a metric that these runs have", "look at the metrics of a run in the MLflow UI")
    return readings, excluded, n_not_finite


def _with_progress(runs: Iterable[Any]) -> Iterator[Any]:
    """A count on the terminal while pages of a large store come in."""
    from rich.progress import Progress, TextColumn

    console = Console(stderr=True)
    with Progress(TextColumn("{task.completed} runs"), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        for run in runs:
            yield run
            progress.advance(task)


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
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()

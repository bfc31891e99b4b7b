"""The command `sweep`: tries the points of a sweep's file, together with all others who give the same command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from trainer.config.problems import shown
from trainer.errors import ConfigError
from trainer.options import (
    EXTRA,
    closes_mlflows_run,
    is_true,
    many_runs_options,
    overrides,
    quiet_libraries,
    switch,
    tell,
    whole_number,
)

if TYPE_CHECKING:
    from trainer.sweep.conduct import Plan
    from trainer.sweep.study import Tried
    from trainer.sweep.sweep_file import Sweep

_MOST = 10**6
"""Of jobs, and of seconds."""

_EPILOG = """
\b
python -m trainer sweep vit_lr                      a file in experiments/sweeps/, or a path
python -m trainer sweep vit_lr --seeds 17 --jobs 1  one seed, one run at a time
python -m trainer sweep vit_lr --storage postgresql+psycopg2://db/sweeps
                                                    on as many machines as you like, at the same time

Any key can be set for all points: --training.num_train_epochs 2. The same command goes on with a sweep that was
interrupted, and shows its ranking when it is over.
"""


@click.command(context_settings=EXTRA, epilog=_EPILOG, short_help="Try the points of a sweep's file, each as a run.")
@click.argument("file")
@click.option(
    "--storage",
    metavar="URL",
    envvar="SWEEP_STORAGE",
    show_envvar=True,
    show_default="an SQLite file in the sweep's folder",
    help="Database of the study, which workers on several machines share.",
)
@click.option("--study", metavar="NAME", show_default="that of FILE", help="Name of the study that workers share.")
@click.option("--seeds", metavar="N,N,...", show_default="as the file says", help="Every point is trained on each.")
@click.option(
    "--trials",
    metavar="N",
    show_default="as the file says",
    help="How many points to try, where the sampler is not grid.",
)
@click.option(
    "--jobs", metavar="N", show_default="one a GPU; without GPUs, one a core", help="Trials at once on this machine."
)
@click.option(
    "--grace",
    metavar="SECONDS",
    default="120",
    show_default=True,
    help="Silence after which a worker counts as dead.",
)
@many_runs_options
@click.option(
    "--output_dir",
    metavar="FOLDER",
    show_default="as the configuration says",
    help="Its folder `sweeps` holds all trials (training.output_dir).",
)
@switch("--dry_run", "--dry-run", help="Only show the points, and what would be done.")
@click.pass_context
@closes_mlflows_run()
def sweep(
    context: click.Context, /, file: str, storage: str | None, study: str | None, seeds: str | None, trials: str | None,
    jobs: str | None, grace: str, dry_run: str, profile: str | None, **short: str | None,
) -> None:  # fmt: skip
    """Try the points of FILE, a sweep, each as a run of its own; several workers share them out.

    FILE is a YAML file, or the name of one in experiments/sweeps/. All trials lie below one run in MLflow, which gets
    the points, best first, as table, CSV and JSON; their folders are in sweeps/STUDY in output_dir. The status is 1
    where a trial has failed.
    """
    given = {key: value for key, value in short.items() if value} | overrides(context.args)
    at_once = whole_number("--jobs", jobs, at_most=_MOST)
    grace_seconds = whole_number("--grace", grace, at_most=_MOST) or 120
    from trainer.sweep.storage import Storage, default_url
    from trainer.sweep.sweep_file import read_sweep

    asked = read_sweep(file, profile=profile, overrides=given, seeds=seeds, trials=trials)
    tell(asked.resolved(asked.first()))
    name = study or asked.name
    if not name.replace("-", "_").replace(".", "_").isidentifier():
        raise ConfigError("--study", shown(name), "letters, digits, -, _ and .", "choose such a name")
    folder = Path(asked.output_dir or asked.resolved(asked.first()).config.training.output_dir) / "sweeps" / name
    place = Storage(storage or default_url(folder), name, grace_seconds=grace_seconds)
    quiet_libraries()
    from trainer.compare.jobs import Board  # MLflow, only when the sweep is known to be right
    from trainer.sweep import conduct
    from trainer.tracking import reach_store

    plan = conduct.plan(asked, place, folder, at_once)
    if is_true("--dry_run", dry_run):
        _show_plan(plan)
        return
    with Board(asked.trials, what="trials") as board:
        board.say(f"{name}: {asked.trials} trials, {plan.room.why}; study in {place.shown}")
        tried = conduct.conduct(plan, reach_store(), board)
    _show(asked, tried)
    if any(one.state.name == "FAIL" for one in tried):
        click.echo(
            "some trials failed; the same command tries again those whose training did not stop itself", err=True
        )
        raise SystemExit(1)


def _show(sweep: "Sweep", tried: "Sequence[Tried]") -> None:
    """The ranking, what failed, what the order is worth, and the command that trains the best."""
    from trainer.sweep import points

    ranked = points.ranked(sweep, tried)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(points.header(sweep), points.rows(sweep, ranked)))
    for one in tried:
        if one.state.name == "FAIL":
            console.print(f"trial {one.first} failed: {one.why}", markup=False)
    console.print(points.statement(ranked), markup=False)
    if best := points.command(sweep, ranked):
        console.print(f"train the best:\n    {best}", markup=False)


def _show_plan(plan: "Plan") -> None:
    """What would be done, by whom, and what the first trial would run."""
    from trainer.sweep import space

    sweep = plan.sweep
    console = Console(highlight=False, soft_wrap=True)
    if sweep.is_grid:
        keys = [axis.key for axis in sweep.axes]
        rows = [[str(index), *map(str, point.values())] for index, point in enumerate(space.grid(sweep.axes))]
        console.print(_table(["trial", *keys], rows))
    else:
        console.print(f"{sweep.trials} points drawn by {sweep.sampler.name} from", markup=False)
        for axis in sweep.axes:
            ends = ", ".join(map(space.short, axis.ends()))
            between = " (bounds)" if isinstance(axis, space.Range) else ""
            console.print(f"    {axis.key}: {ends}{between}", markup=False)
    strategy, changed = sweep.of(sweep.first())
    settings = " ".join(f"--{key} {text}" for key, text in changed.items())
    console.print(f"one of them: python -m trainer run {strategy} {settings}", markup=False)
    console.print(f"by {sweep.metric}, pruner {sweep.pruner.name}; {plan.room.why}", markup=False)
    console.print(f"trials in {plan.folder}, study {plan.storage.name} in {plan.storage.shown}", markup=False)


def _table(header: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> Table:
    table = Table(*(name.rpartition(".")[2] for name in header))
    for row in rows:
        table.add_row(*row)
    return table

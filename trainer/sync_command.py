"""The command `sync`: brings to MLflow what runs could not deliver, and closes runs whose process died."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.options import quiet_libraries

_EPILOG = """
\b
python -m trainer sync output                          every run in it, those of comparisons and sweeps too
python -m trainer sync output/last6_lora-seed17-*      some of them

The store is the one that a run was begun with. A password is taken from the environment, as MLflow does. Whatever is
sent twice is there once: the command can be given again, also while other runs train.
"""


@click.command(epilog=_EPILOG, short_help="Deliver to MLflow what runs could not.")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def sync(folders: tuple[Path, ...]) -> None:
    """Deliver to MLflow what the runs in FOLDERS could not, and close runs whose process has died.

    FOLDERS are those of runs, or hold such folders. The status is 1 where something could not be delivered: it stays
    beside its run. Runs that are training now are left alone; they deliver by themselves.
    """
    quiet_libraries()
    from trainer.sync import STILL_TRAINING  # MLflow
    from trainer.sync import sync as deliver

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("entries"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks = {}

        def watch(path: Path, gone: int, total: int) -> None:
            if path not in tasks:
                tasks[path] = progress.add_task(path.name, total=total)
            progress.update(tasks[path], completed=gone, total=total)

        synced = deliver(folders, watch)
    for run in synced:
        if run.delivered or run.waiting or run.note:
            left = f", {run.waiting} left" if run.waiting else ""
            click.echo(f"{run.path}: {run.delivered} delivered{left}{f' ({run.note})' if run.note else ''}")
    waiting = [run for run in synced if run.waiting]
    if waiting:
        click.echo(f"{len(waiting)} of {len(synced)} runs are not all in MLflow yet; nothing is lost", err=True)
        raise SystemExit(1)
    ended = [run for run in synced if run.note != STILL_TRAINING]
    but = ", but for what is said above" if any(run.note for run in ended) else ""
    click.echo(f"everything of {len(ended)} runs is in MLflow{but}")

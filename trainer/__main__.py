"""Command line of the trainer: `python -m trainer COMMAND`; turns our errors into one message and an exit status."""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import click

from trainer import collector, data_commands, launch, redact, sync_command
from trainer.config.resolved import Resolved
from trainer.errors import Interrupted, TrainingStopped, UserError
from trainer.options import (
    EXTRA,
    OVERRIDES_HELP,
    PLAN_HELP,
    config_options,
    is_true,
    quiet_libraries,
    resolve,
    resume_options,
    tell,
)
from trainer.redact import RedactedStream
from trainer.signals import SIGNALS, end_with_parent

EXIT_ERROR, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 3, 130
_LET_SPEAK_SECONDS = 5.0

_HELP = """
\b
python -m trainer plan last6_lora       what would be trained, how long, with which settings
python -m trainer preview last6_lora    what the model sees of the training records
python -m trainer run last6_lora        train it
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
def cli() -> None:
    """Fine-tune a chosen part of Qwen3-VL's vision tower and log the run to MLflow."""


@cli.command(context_settings=EXTRA, epilog=OVERRIDES_HELP)
@config_options
@resume_options
def run(
    context: click.Context, config: str, profile: str | None, resume: str, allow_drift: str, **short: str | None
) -> None:
    """Train one configuration and log it to MLflow; go on with it where it was interrupted."""
    try:
        resolved = resolve(context, config, profile, short, resume=resume)
        drift = is_true("--allow-drift", allow_drift)
        if resolved.config.launch.ranks > 1 and not launch.is_rank():
            _run_ranks(resolved)  # the first of them looks whether the store is there
            return
        with collector.at_rest():  # MLflow and torch, only when the configuration is known to be right
            quiet_libraries()
            store = None
            if launch.is_first():
                from trainer.tracking import reach_store  # MLflow, which no other rank needs

                store = reach_store()
            from trainer import gpus

            gpus.see_only(resolved.config.launch.gpus)
            from trainer import run as root
            from trainer.show import show_outcome
        tell(resolved)
        if store is not None and store.away:
            click.echo(f"{store.name} does not answer ({store.away}); what is logged is kept beside the run", err=True)
        outcome = root.run(resolved, logs_to=store, resume_from=resume or "auto", allow_drift=drift)
        if launch.is_first():
            show_outcome(outcome)
    except BaseException as error:
        if os.environ.get("MLFLOW_RUN_ID") and launch.is_first():
            from trainer.tracker import status_after
            from trainer.tracking import abandon

            abandon(error, status_after(error))
        raise


def _run_ranks(resolved: Resolved) -> None:
    """Train on several ranks; where they died without a word, the run is closed for them."""
    status = launch.start(resolved.config.launch.ranks, sys.argv[1:])
    if status:
        from trainer.sync import close_dead

        for line in close_dead(Path(resolved.config.training.output_dir)):
            click.echo(line, err=True)
        raise SystemExit(status)


@cli.command(context_settings=EXTRA, epilog=PLAN_HELP)
@config_options
def plan(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Print what a run would do, without training: settings with their origin, parameters, steps, batch."""
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    with collector.at_rest():
        quiet_libraries()
        from trainer.show import show_plan
    show_plan(resolved)


@cli.command("pocket-base")
@click.option("--output_dir", default="output/pocket_base", show_default=True, help="Folder for the new weights.")
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights (its figures are in its pocket.json)."""
    quiet_libraries()
    from trainer.begin import open_aside
    from trainer.facts import log_base
    from trainer.pocket import train_base

    with open_aside("pocket_base") as tracker:
        log_base(tracker, train_base(output_dir))


for command in (data_commands.validate, data_commands.preview, data_commands.convert, sync_command.sync):
    cli.add_command(command)


def _let_the_first_rank_speak() -> None:
    """What stops one rank nearly always stops all: the first says it, and its end ends the others while they wait."""
    if not launch.is_first():
        time.sleep(_LET_SPEAK_SECONDS)


def _status() -> int:
    """Run a command and tell what went wrong; the exit status says how it ended."""
    try:
        cli(prog_name="python -m trainer", standalone_mode=False)
    except UserError as error:
        _let_the_first_rank_speak()
        click.echo(f"error: {error}", err=True)
        return EXIT_USER
    except click.ClickException as error:
        error.show()
        return EXIT_USER
    except TrainingStopped as error:
        _let_the_first_rank_speak()
        click.echo(f"stopped: {error}", err=True)
        return EXIT_STOPPED
    except Interrupted as error:
        if launch.is_first():
            click.echo(f"interrupted {error}; the same command goes on from there", err=True)
        return SIGNALS.status
    except (KeyboardInterrupt, click.Abort):
        if not launch.is_rank():  # whoever started the ranks says it
            click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - told in full, and by the status
        _let_the_first_rank_speak()  # most likely it was an error of its own that broke what this rank waited for
        traceback.print_exc()
        return EXIT_ERROR
    return 0


def main() -> NoReturn:
    """The command line."""
    redactor = redact.of_environment()
    sys.stdout, sys.stderr = RedactedStream(sys.stdout, redactor), RedactedStream(sys.stderr, redactor)
    SIGNALS.install(is_rank=launch.is_rank())
    if launch.is_rank() or os.environ.get("MLFLOW_RUN_ID"):
        end_with_parent(under_mlflow=not launch.is_rank())
    try:
        status = _status()
    except SystemExit as ending:  # a signal, or the status of the ranks that were started
        status = int(ending.code or 0)
    launch.end(status)


if __name__ == "__main__":
    main()

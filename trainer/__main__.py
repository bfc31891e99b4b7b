"""Command line of the trainer: `python -m trainer COMMAND`; turns our errors into one message and an exit status."""

import math
import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn

import click

from trainer import data_commands, launch
from trainer.errors import TrainingStopped, UserError
from trainer.options import EXTRA, OVERRIDES_HELP, config_options, quiet_libraries, resolve, tell

EXIT_ERROR, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 3, 130

_SAME_WISH_SECONDS = 5.0
"""Signals that follow the first so soon ask for the same thing: under `mlflow run`, Ctrl-C reaches us from the terminal
and again from MLflow, and must not interrupt the closing of the run."""

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
def run(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Train one configuration and log it to MLflow."""
    try:
        resolved = resolve(context, config, profile, short)
        quiet_libraries()
        from trainer import gpus, tracking  # MLflow and torch, only when the configuration is known to be right

        if launch.is_first():
            tracking.reach_store()
        if resolved.config.launch.nproc > 1 and not launch.is_rank():
            if status := launch.start(resolved.config.launch.nproc, sys.argv[1:]):
                raise SystemExit(status)
            return
        gpus.see_only(resolved.config.launch.gpus)
        tell(resolved)
        from trainer import run as root
        from trainer.show import show_outcome

        outcome = root.run(resolved)
        if launch.is_first():
            show_outcome(outcome)
    except BaseException as error:
        if os.environ.get("MLFLOW_RUN_ID") and launch.is_first():
            from trainer.tracking import abandon

            abandon(error)
        raise


@cli.command(context_settings=EXTRA, epilog=OVERRIDES_HELP)
@config_options
def plan(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Print what a run would do, without training: settings with their origin, parameters, steps, batch."""
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    quiet_libraries()
    from trainer.show import show_plan

    show_plan(resolved)


@cli.command("pocket-base")
@click.option("--output_dir", default="output/pocket_base", show_default=True, help="Folder for the new weights.")
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights (its figures are in its pocket.json)."""
    quiet_libraries()
    from trainer.facts import log_base
    from trainer.pocket import train_base
    from trainer.tracking import open_run

    with open_run(run_name="pocket_base") as tracker:
        log_base(tracker, train_base(output_dir))


for command in (data_commands.validate, data_commands.preview, data_commands.convert):
    cli.add_command(command)


def _stop_on_signals() -> None:
    """Turn Ctrl-C, termination and a closed terminal into exceptions, so that a run is closed as what it is."""
    asked = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        before, asked = asked, time.monotonic()
        if asked - before < _SAME_WISH_SECONDS:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell that keeps Ctrl-C from its background
            signal.signal(number, stop)


def _let_the_first_rank_speak() -> None:
    """What stops one rank nearly always stops all: the first says it, and its end ends the others while they wait."""
    if not launch.is_first():
        time.sleep(_SAME_WISH_SECONDS)


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
    _stop_on_signals()
    try:
        status = _status()
    except SystemExit as ending:  # a signal, or the status of the ranks that were started
        status = int(ending.code or 0)
    launch.end(status)


if __name__ == "__main__":
    main()

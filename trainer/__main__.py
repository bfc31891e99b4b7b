"""Command line of the trainer: `python -m trainer COMMAND`; turns our errors into one message and an exit status."""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import click

from trainer import collector, launch, redact
from trainer.commands import COMMANDS
from trainer.errors import Interrupted, Paused, TrainingStopped, UserError
from trainer.options import (
    EXTRA,
    PLAN_HELP,
    RUN_HELP,
    Commands,
    closes_mlflows_run,
    config_options,
    is_true,
    never_refuse,
    quiet_libraries,
    resolve,
    resume_options,
    tell,
)
from trainer.processes import to_their_end
from trainer.redact import RedactedStream
from trainer.signals import SIGNALS, end_with_parent, is_started_by_us

EXIT_ERROR, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_ENDED = 1, 2, 3, 130, 143
_LET_SPEAK_SECONDS = 5.0
_OUT_OF_MEMORY = """
The GPU's memory is full. `python -m trainer plan` with the same options tells what a rank holds, part by part;
docs/real_model.md says what to turn down, and in which order."""

_HELP = """
\b
python -m trainer plan last6_lora       what would be trained, how long, with which settings
python -m trainer preview last6_lora    what the model sees of the training records
python -m trainer run last6_lora        train it
python -m trainer run --help            what a command does, writes and takes

Exit status: 0 done; 2 a mistake, told in one message; 3 training has stopped itself (training gate, a loss that is not
finite); 130 or 143 interrupted, and the same command goes on; 1 anything else.
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
def cli() -> None:
    """Fine-tune a chosen part of Qwen3-VL's vision tower and log the run to MLflow.

    The MLflow store is that of MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db in the current folder.
    """


@cli.command(context_settings=EXTRA, epilog=RUN_HELP, short_help="Train one configuration.")
@config_options
@resume_options
@closes_mlflows_run()
def run(
    context: click.Context, config: str, profile: str | None, resume: str, allow_drift: str,
    pause_after_samples: int | None, **short: str | None,
) -> None:  # fmt: skip
    """Train one configuration and log it to MLflow; go on with it where it was interrupted.

    The run gets a folder of its own in output_dir: its checkpoints (best and last), resume points while it trains, and
    what MLflow has not taken yet. Metrics, settings and the training gate's verdict go to MLflow while it happens.
    """
    resolved = resolve(context, config, profile, short, resume=resume)
    drift, asked = is_true("--allow_drift", allow_drift), resolved.config.launch
    if (asked.ranks > 1 or asked.restarts or asked.hosts) and not launch.is_rank():
        if status := to_their_end(asked, sys.argv[1:], Path(resolved.config.training.output_dir)):
            raise SystemExit(status)
        return  # the first of them has looked whether the store is there
    with collector.at_rest():  # MLflow and torch, only when the configuration is known to be right
        quiet_libraries()
        store = None
        if launch.is_first():
            from trainer.tracking import reach_store  # MLflow, which no other rank needs

            store = reach_store()
        from trainer import gpus

        gpus.see_only(asked.gpus)
        launch.choose_network(asked.interface)
        from trainer import run as root
        from trainer.show import show_outcome
    tell(resolved)
    if store is not None and store.away:
        click.echo(f"{store.name} does not answer ({store.away}); what is logged is kept beside the run", err=True)
    resume = launch.resume_of_this_start(resume or "auto")
    outcome = root.run(resolved, logs_to=store, resume_from=resume, allow_drift=drift, pause_after=pause_after_samples)
    if launch.is_first():
        show_outcome(outcome)


@cli.command(context_settings=EXTRA, epilog=PLAN_HELP, short_help="Print what a run would do, without training.")
@config_options
def plan(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Print what a run would do, without training: settings with their origin, parameters, steps, batch, memory, time.

    Memory and operations are computed from the model's shapes, what trains, and the samples of the first epoch. Time is
    that of an earlier run of the same work in output_dir on this machine; else, on a GPU that is known, operations at
    rates measured on an H200; else it is not known. A run in bfloat16 on a machine without a GPU is also told on as
    many H200s as launch.nproc says.
    """
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    with collector.at_rest():
        quiet_libraries()
        from trainer.show import show_plan
    show_plan(resolved)


for command in COMMANDS:
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
    except Paused as error:
        if launch.is_first():
            click.echo(f"paused {error}; the same command goes on, with a larger number or without", err=True)
    except Interrupted as error:
        if launch.is_first():
            click.echo(f"interrupted {error}; the same command goes on from there", err=True)
        return SIGNALS.status
    except (KeyboardInterrupt, click.Abort):
        if not launch.is_rank():  # whoever started the ranks says it
            click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # told in full, and by the status
        if launch.is_rank() and launch.is_of_another(error):
            click.echo(launch.told_of_another(error), err=True)
            return EXIT_ENDED
        _let_the_first_rank_speak()  # most likely it was an error of its own that broke what this rank waited for
        traceback.print_exc()
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported to ask
            click.echo(_OUT_OF_MEMORY, err=True)
        return EXIT_ERROR
    return 0


def main() -> NoReturn:
    """The command line."""
    redactor = redact.of_environment()
    never_refuse(sys.stdout)
    sys.stdout, sys.stderr = RedactedStream(sys.stdout, redactor), RedactedStream(sys.stderr, redactor)
    SIGNALS.install(is_rank=launch.is_rank())
    if launch.is_rank() or os.environ.get("MLFLOW_RUN_ID") or is_started_by_us():
        end_with_parent(under_mlflow=not launch.is_rank())
    try:
        status = _status()
    except SystemExit as ending:  # a signal, or the status of the ranks that were started
        status = int(ending.code or 0)
    launch.end(status)


if __name__ == "__main__":
    main()

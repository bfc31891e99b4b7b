"""Command line of the trainer: `python -m trainer COMMAND`; turns our errors into one message and an exit status."""

import logging
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from trainer import launch
from trainer.errors import TrainingStopped, UserError

EXIT_ERROR, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 3, 130

_SAME_WISH_SECONDS = 5.0
"""Signals that follow the first so soon ask for the same thing: under `mlflow run`, Ctrl-C reaches us from the terminal
and again from MLflow, and must not interrupt the closing of the run."""

_EXTRA = {"ignore_unknown_options": True, "allow_extra_args": True}

_OVERRIDES_HELP = """
\b
CONFIG is a YAML file, or the name of one in experiments/ (last6_lora).
Any key can be overridden: --training.num_train_epochs 3 --tuner.lora_rank 8
"""


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """CONFIG, the profile, and the short names of the keys that are overridden most."""
    options: list[Callable[[Any], Any]] = [
        click.argument("config"),
        click.option("--profile", help="Scale: pocket, published, none, or a YAML file. [default: pocket for ours]"),
        click.option("--model", help="Base model: pocket, random:4b, a folder, or a hub id (model.model)."),
        click.option("--train_jsonl", help="Training records (custom.train_jsonl)."),
        click.option("--val_jsonl", help="Validation records (custom.val_jsonl)."),
        click.option("--seed", help="Seed of data order, dropout and new weights (training.seed)."),
        click.option("--max_steps", help="Stop after so many optimizer steps (training.max_steps)."),
        click.option("--output_dir", help="Folder for checkpoints (training.output_dir)."),
        click.pass_context,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    r"""Fine-tune a chosen part of Qwen3-VL's vision tower and log the run to MLflow.

    \b
    python -m trainer plan last6_lora     what would be trained, how long, with which settings
    python -m trainer run last6_lora      train it
    """


@cli.command(context_settings=_EXTRA, epilog=_OVERRIDES_HELP)
@_config_options
def run(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Train one configuration and log it to MLflow."""
    try:
        resolved = _resolve(context, config, profile, short)
        _quiet_libraries()
        from trainer import tracking  # MLflow and torch are imported only after the configuration is known to be right

        if launch.is_first():
            tracking.reach_store()
        if resolved.config.launch.nproc > 1 and not launch.is_rank():
            if status := launch.start(resolved.config.launch.nproc, sys.argv[1:]):
                raise SystemExit(status)
            return
        _tell(resolved)
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


@cli.command(context_settings=_EXTRA, epilog=_OVERRIDES_HELP)
@_config_options
def plan(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Print what a run would do, without training: settings with their origin, parameters, steps, batch."""
    resolved = _resolve(context, config, profile, short)
    _tell(resolved)
    _quiet_libraries()
    from trainer.show import show_plan

    show_plan(resolved)


@cli.command("pocket-base")
@click.option("--output_dir", default="output/pocket_base", show_default=True, help="Folder for the new weights.")
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights (its figures are in its pocket.json)."""
    _quiet_libraries()
    from trainer.facts import log_base
    from trainer.pocket import train_base
    from trainer.tracking import open_run

    with open_run(run_name="pocket_base") as tracker:
        log_base(tracker, train_base(output_dir))


def _resolve(context: click.Context, config: str, profile: str | None, short: dict[str, str | None]) -> Any:
    from trainer.config.load import load

    given = {key: value for key, value in short.items() if value}
    return load(config, profile=profile or None, overrides=given | _overrides(context.args))


def _tell(resolved: Any) -> None:
    """Say once what is legal and changes nothing, or is probably not meant."""
    for line in (*resolved.warnings, *resolved.no_effect) if launch.is_first() else ():
        click.echo(line, err=True)


def _overrides(arguments: list[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` pairs, as the command line left them over."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or (not equals and not rest):
            raise click.UsageError(f"{name!r}: expected --section.key VALUE (see --help)")
        overrides[name.removeprefix("--")] = value if equals else rest.pop(0)
    return overrides


def _quiet_libraries() -> None:
    """Silence what libraries say about themselves; what a user must know, we say."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|accelerate|torch\.distributed")
    for name in ("alembic", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


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

"""Command line of the trainer: `python -m trainer COMMAND`; turns our errors into one message and an exit status."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from trainer.errors import TrainingStopped, UserError

EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 3, 130, 143

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
    resolved = _resolve(context, config, profile, short)
    _quiet_libraries()
    from trainer import run as root  # imports torch and MLflow: only after the configuration is known to be right
    from trainer.show import show_outcome

    show_outcome(root.run(resolved))


@cli.command(context_settings=_EXTRA, epilog=_OVERRIDES_HELP)
@_config_options
def plan(context: click.Context, config: str, profile: str | None, **short: str | None) -> None:
    """Print what a run would do, without training: settings with their origin, parameters, steps, batch."""
    resolved = _resolve(context, config, profile, short)
    _quiet_libraries()
    from trainer.show import show_plan

    show_plan(resolved)


@cli.command("pocket-base", context_settings=_EXTRA)
@click.option("--output_dir", default="output/pocket_base", show_default=True, help="Folder for the new weights.")
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights (its figures are in its pocket.json)."""
    from trainer.pocket import train_base

    train_base(output_dir)


def _resolve(context: click.Context, config: str, profile: str | None, short: dict[str, str | None]) -> Any:
    from trainer.config.load import load

    given = {key: value for key, value in short.items() if value}
    resolved = load(config, profile=profile or None, overrides=given | _overrides(context.args))
    for line in (*resolved.warnings, *resolved.no_effect):
        click.echo(line, err=True)
    return resolved


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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("mlflow", "alembic", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


def main() -> NoReturn:
    """Run a command; the exit status says how it ended."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli(prog_name="python -m trainer", standalone_mode=False)
        sys.exit(0)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except TrainingStopped as error:
        click.echo(f"stopped: {error}", err=True)
        sys.exit(EXIT_STOPPED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()

"""What commands on a configuration share: their options, the configuration that these mean, and quiet libraries."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from trainer import launch, ranks
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError

EXTRA = {"ignore_unknown_options": True, "allow_extra_args": True}

OVERRIDES_HELP = """
\b
CONFIG is a YAML file, or the name of one in experiments/ (last6_lora).
Any key can be overridden: --training.num_train_epochs 3 --tuner.lora_rank 8
"""

PLAN_HELP = f"""{OVERRIDES_HELP}
What is printed ends with memory and time. Memory and operations are computed from the model's shapes, what trains, and
the samples of the first epoch. Time is that of an earlier run of the same work in training.output_dir on this machine;
else, on a GPU that is known, operations at rates measured on an H200; else it is not known. A run in bfloat16 on a
machine without a GPU is also told on as many H200s as launch.nproc says.
"""


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
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


def resume_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whether an interrupted run is gone on with, and where it pauses."""
    command = click.option(
        "--pause_after_samples",
        type=click.IntRange(min=1),
        callback=_refuse_under_mlflow,
        help="Pause after the first optimizer step that has seen so many training samples, with exit status 0: the "
        "same command goes on bit-identical, with a larger number or without one.",
    )(command)
    command = click.option(
        "--resume",
        default="auto",
        help="auto: go on with the newest interrupted run of this configuration in output_dir; never: a new run; "
        "or the folder of an interrupted run, or of one of its resume points.  [default: auto]",
    )(command)
    return click.option(
        "--allow-drift",
        "--allow_drift",
        is_flag=False,
        flag_value="true",
        default="",
        help="Go on also under another configuration; the differences become the tag param_drift.",
    )(command)


def _refuse_under_mlflow(_: click.Context, option: click.Parameter, samples: int | None) -> int | None:
    """Let nothing pause whose end is written down by `mlflow run`: that would call it FINISHED.

    Raises:
        ConfigError: it would.
    """
    if samples is not None and os.environ.get("MLFLOW_RUN_ID"):
        raise ConfigError(
            f"--{option.name}", "a pause under `mlflow run`, which would call the run FINISHED",
            "a run that is started by python -m trainer run", "start it so, or leave the option out",
        )  # fmt: skip
    return samples


def is_true(option: str, value: str) -> bool:
    """What `--option`, `--option true` and, from an entry point that was not given it, `--option ''` mean.

    Raises:
        click.UsageError: anything else.
    """
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if value.lower() not in known:
        raise click.UsageError(f"{option} {value!r}: expected true or false")
    return known[value.lower()]


def resolve(
    context: click.Context, config: str, profile: str | None, short: dict[str, str | None], *, resume: str = "never"
) -> Resolved:
    """The configuration that a command line means, as it holds on this machine and for a run that is gone on with.

    Raises:
        ConfigError: anything wrong in it.
    """
    from trainer.config.load import load

    given = {key: value for key, value in short.items() if value}
    resolved = load(config, profile=profile or None, overrides=given | overrides(context.args))
    if resolved.config.launch.gpus is not None:
        from trainer import gpus  # imports torch

        resolved = gpus.settled(resolved)
    return ranks.settled(resolved, resume)


@contextmanager
def closes_mlflows_run() -> Iterator[None]:
    """While a command does its work: close the run that `mlflow run` has made for it where an error comes first."""
    try:
        yield
    except BaseException as error:
        # ranks that may be started again leave that to `mlflow run`: a run that was closed takes nothing more
        if os.environ.get("MLFLOW_RUN_ID") and launch.is_first() and launch.STATUSES not in os.environ:
            from trainer.tracker import status_after
            from trainer.tracking import abandon

            abandon(error, status_after(error))
        raise


def tell(resolved: Resolved) -> None:
    """Say once what is legal and changes nothing, or is probably not meant."""
    for line in (*resolved.warnings, *resolved.no_effect) if launch.is_first() else ():
        click.echo(line, err=True)


def overrides(arguments: list[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` pairs, as the command line left them over."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or (not equals and not rest):
            raise click.UsageError(f"{name!r}: expected --section.key VALUE (see --help)")
        found[name.removeprefix("--")] = value if equals else rest.pop(0)
    return found


def quiet_libraries() -> None:
    """Silence what libraries say about themselves; what a user must know, we say."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|accelerate|torch\.distributed")
    for name in ("alembic", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of fonts, and of the list it makes of them once
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

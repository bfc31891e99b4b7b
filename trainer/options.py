"""What commands on a configuration share: their options, the configuration that these mean, and quiet libraries."""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from trainer import launch
from trainer.config.problems import shown
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.resolved import Resolved

EXTRA = {"ignore_unknown_options": True, "allow_extra_args": True}

OVERRIDES_HELP = """
CONFIG is a YAML file, or the name of one in experiments/, such as last6_lora. Any key of it can be overridden:
--training.num_train_epochs 3 --tuner.lora_rank 8. All keys are in experiments/base.yaml.
"""
"""The end of the help of every command that takes CONFIG."""

RUN_HELP = f"""
\b
python -m trainer run last6_lora
python -m trainer run last6_full --seed 18 --training.num_train_epochs 2
python -m trainer run last6_lora --train_jsonl data/train.jsonl --val_jsonl data/val.jsonl
mlflow run . -e last6_lora -P seed=18         the same from a checkout, as a run that MLflow begins
{OVERRIDES_HELP}"""

PLAN_HELP = f"""
\b
python -m trainer plan last6_lora
python -m trainer plan all_full --training.num_train_epochs 2 --tuner.lora_rank 8
python -m trainer plan last6_lora --profile published --model random:4b
{OVERRIDES_HELP}"""

_Options = Callable[[Callable[..., Any]], Callable[..., Any]]


class Commands(click.Group):
    """Commands in the order in which they are needed, found under both spellings: `pocket_base` and `pocket-base`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names in the order in which they were added.

        Args:
            ctx: of the command line.
        """
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; commands are registered with underscores, as entry points of MLproject are.

        Args:
            ctx: of the command line.
            cmd_name: as it was typed.
        """
        return super().get_command(ctx, cmd_name.replace("-", "_"))


class OneOf(click.Choice[str]):
    """A choice that lets the empty text through, which `mlflow run` passes for a parameter that was not given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value as it was given, one of the choices or empty.

        Args:
            value: as it was typed.
            param: the option.
            ctx: of the command line.
        """
        return "" if value == "" else super().convert(value, param, ctx)


def all_of(*options: _Options) -> _Options:
    """Several options as one decorator; help shows them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def switch(*names: str, **further: Any) -> _Options:
    """An option that stands alone or takes true or false; its value is text for `is_true`, empty where not given.

    It is no plain flag, because an entry point of MLproject cannot leave an option out: it passes an empty text.
    """
    return click.option(*names, is_flag=False, flag_value="true", default="", metavar="[true|false]", **further)


_scale_and_data = all_of(
    click.option(
        "--profile",
        metavar="NAME|FILE",
        show_default="pocket for files of experiments/, else none",
        help="Scale: pocket or published (experiments/profiles/), none, or a YAML file.",
    ),
    click.option(
        "--model", metavar="MODEL", help="Base model: pocket, random:4b, a folder, or a hub id (model.model)."
    ),
    click.option("--train_jsonl", metavar="FILE", help="Training records (custom.train_jsonl)."),
    click.option("--val_jsonl", metavar="FILE", help="Validation records (custom.val_jsonl)."),
)

config_options = all_of(
    click.argument("config"),
    _scale_and_data,
    click.option("--seed", metavar="N", help="Seed of data order, dropout and new weights (training.seed)."),
    click.option("--max_steps", metavar="N", help="Stop after so many optimizer steps (training.max_steps)."),
    click.option("--output_dir", metavar="FOLDER", help="Folder that holds the folders of runs (training.output_dir)."),
    click.pass_context,
)
"""CONFIG, the profile, and the short names of the keys that are overridden most."""

many_runs_options = all_of(
    _scale_and_data,
    click.option("--max_steps", metavar="N", help="Stop every run after so many optimizer steps (training.max_steps)."),
)
"""Of `config_options` what commands take that train many configurations."""


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


resume_options = all_of(
    click.option(
        "--resume",
        metavar="[auto|never|FOLDER]",
        default="auto",
        show_default=True,
        help="auto: go on with the newest interrupted run of this configuration in output_dir; never: a new run; "
        "or the folder of an interrupted run, or of one of its resume points.",
    ),
    switch(
        "--allow_drift",
        "--allow-drift",
        help="Go on also under another configuration; the differences become the tag param_drift.",
    ),
    click.option(
        "--pause_after_samples",
        metavar="N",
        type=click.IntRange(min=1),
        callback=_refuse_under_mlflow,
        help="Pause after the first optimizer step that has seen so many training samples, with exit status 0: the "
        "same command goes on bit-identical, with a larger number or without one.",
    ),
)
"""Whether an interrupted run is gone on with, and where it pauses."""


def is_true(option: str, value: str) -> bool:
    """What `--option`, `--option true` and, from an entry point that was not given it, `--option ''` mean.

    Raises:
        ConfigError: anything else.
    """
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if value.lower() not in known:
        raise ConfigError(option, shown(value), "true or false", "write one of these, or the option alone")
    return known[value.lower()]


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value, checked where a run of MLflow can still be closed with the message.

    Raises:
        ConfigError: it is none of those that are allowed.
    """
    if value not in allowed:
        raise ConfigError(option, shown(value), ", ".join(allowed), "take one of these")
    return value


def whole_number(option: str, text: str | None, *, at_most: int) -> int | None:
    """A number from 1, or None where none was given.

    Raises:
        ConfigError: it is no such number.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= at_most):
        raise ConfigError(
            option, shown(text), f"a whole number from 1 to {at_most}", "correct it, or leave the option out"
        )
    return int(text)


def resolve(
    context: click.Context, config: str, profile: str | None, short: dict[str, str | None], *, resume: str = "never"
) -> "Resolved":
    """The configuration that a command line means, as it holds on this machine and for a run that is gone on with.

    Raises:
        ConfigError: anything wrong in it.
    """
    from trainer import ranks
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


def tell(resolved: "Resolved") -> None:
    """Say once what is legal and changes nothing, or is probably not meant."""
    for line in (*resolved.warnings, *resolved.no_effect) if launch.is_first() else ():
        click.echo(line, err=True)


def never_refuse(stream: TextIO) -> None:
    """Write letters that a stream's encoding does not have, such as those of a file's odd name, as escapes."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


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

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers annotates neither
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above

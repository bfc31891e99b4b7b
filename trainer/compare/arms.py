"""What is to be compared: arms and seeds as they are written on the command line, checked before anything starts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer import launch
from trainer.config.load import SHORT_NAMES, load
from trainer.config.problems import place, shown
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError

_NAME = re.compile(r"[\w.+=-]{1,80}")
_BETWEEN_ARMS = re.compile(r",(?![^\[]*\])")  # not inside of a list
_BETWEEN_SETTINGS = re.compile(r"\+(?=[A-Za-z_][\w.]*=)")  # 1e+4 is a number
_OURS = {
    "training.seed": "--seeds",
    "training.output_dir": "--output_dir",
    "training.run_name": "the arm and its seed",
    "tracking.arm": "NAME=STRATEGY in --strategies",
}
"""Settings that belong to the comparison: every run has its own."""
_EXAMPLE = "last6_lora,last6_full, or a=last6_lora,b=last6_lora+training.vit_lr=1e-4"
_MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True)
class Arm:
    """One strategy in a comparison, perhaps with settings of its own."""

    name: str
    strategy: str
    """A configuration file, or the name of one in `experiments/`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> value, of this arm alone; laid over those of all arms."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a strategy as it is, under its own name."""
        return not self.settings and self.name == Path(self.strategy).stem

    def with_settings(self, settings: Mapping[str, str]) -> "Arm":
        """The arm of the same name with further settings."""
        return Arm(self.name, self.strategy, {**self.settings, **settings})


@dataclass(frozen=True, slots=True)
class Entered:
    """An arm with its configuration: what `trainer run` would train of it."""

    arm: Arm
    resolved: Resolved
    """Of the first seed."""

    @property
    def ranks(self) -> int:
        """Ranks of each run; one, unless a number is asked for: what a machine has more is for other runs."""
        return self.resolved.config.launch.ranks

    @property
    def rate(self) -> str:
        """The learning rate that is tried out: of vision, or of the aligner where no part of vision trains."""
        strategy = self.resolved.config.strategy
        frozen = strategy is not None and strategy.vision.method == "frozen"
        none = strategy is not None and all(blocks == "none" for _, blocks in strategy.vision.stages)
        return "training.aligner_lr" if frozen or none else "training.vit_lr"

    @property
    def rate_now(self) -> float:
        """Its value without any trial."""
        training = self.resolved.config.training
        return training.aligner_lr if self.rate == "training.aligner_lr" else training.vit_lr


def parse_arms(text: str) -> tuple[Arm, ...]:
    """`STRATEGY` or `NAME=STRATEGY`, each with `+section.key=value` as often as needed, and commas in between.

    Raises:
        ConfigError: it is something else, or two arms have one name.
    """
    arms = tuple(_parse_arm(part.strip()) for part in _BETWEEN_ARMS.split(text))
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "--strategies", f"{', '.join(twice)} more than once", "arms of different names",
            f"name them: a={twice[0].partition('+')[0]},b={twice[0].partition('+')[0]}",
        )  # fmt: skip
    return arms


def _parse_arm(text: str) -> Arm:
    head, *rest = _BETWEEN_SETTINGS.split(text)
    settings = dict(part.split("=", 1) for part in rest)
    name, named, strategy = head.partition("=")
    if not named:
        name, strategy = (
            Path(head).stem + "".join(f"+{key.rpartition('.')[2]}={v}" for key, v in settings.items()),
            head,
        )
    if not strategy or not _NAME.fullmatch(name):
        raise ConfigError("--strategies", shown(text), "STRATEGY, or NAME=STRATEGY", f"write arms such as {_EXAMPLE}")
    check_settings(settings, f"--strategies, arm {name}")
    return Arm(name, strategy, {SHORT_NAMES.get(key, key): value for key, value in settings.items()})


def check_settings(settings: Mapping[str, str], where: str) -> None:
    """Refuse what every run of a comparison has of its own.

    Args:
        settings: dotted key or short name -> value.
        where: for the message.

    Raises:
        ConfigError: one of them is such a key.
    """
    for key, value in settings.items():
        if by := _OURS.get(SHORT_NAMES.get(key, key)):
            raise ConfigError(where, f"{key}={value}", "any other key", f"take it out; {by} says it here")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Different seeds with commas in between.

    Raises:
        ConfigError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    seeds = tuple(int(part) for part in parts if part.isascii() and part.isdecimal())
    if len(seeds) < len(parts) or len(set(seeds)) < len(seeds) or len(seeds) > _MOST_SEEDS:
        raise ConfigError("--seeds", shown(text), "different whole numbers from 0", "write seeds such as 17,18,19")
    return seeds


def enter(arms: Sequence[Arm], seed: int, profile: str | None, common: Mapping[str, str]) -> tuple[Entered, ...]:
    """Read the configuration of every arm, so that a mistake in any of them is told before one starts.

    Args:
        arms: what is compared.
        seed: the first seed.
        profile: the scale of all of them; None: as `trainer run` would take it.
        common: dotted key or short name -> value, of all arms.

    Raises:
        ConfigError: anything wrong in one of them.
    """
    check_settings(common, "-P")
    entered = [Entered(a, load(a.strategy, profile=profile, overrides=_given(a, seed, common))) for a in arms]
    for each in entered:
        on_one_host(each.resolved, "compare")
    return tuple(entered)


def on_one_host(resolved: Resolved, command: str) -> None:
    """Refuse runs on several hosts: a command that starts many runs gives each a part of its own machine.

    Raises:
        ConfigError: `launch.hosts` is set.
    """
    if resolved.config.launch.hosts:
        raise ConfigError(
            place(resolved.origins["launch.hosts"], "launch.hosts"), f"{resolved.config.launch.hosts}, and {command}",
            "runs that each lie on one host", "take it out; runs on several hosts are started one by one",
        )  # fmt: skip


def gpus_of(entered: Sequence[Entered]) -> str | None:
    """`launch.gpus` of all arms, which is dealt out to their runs; None: no arm names any, or there is none here.

    Raises:
        ConfigError: arms name different ones, or such as are not there.
    """
    if not launch.may_have_gpus():
        return None
    from trainer import gpus  # imports torch

    for each in entered:
        gpus.settled(each.resolved)
    named = {each.resolved.config.launch.gpus: each for each in reversed(entered)}
    if len(named) > 1 and gpus.count(None):
        told = ", ".join(f"{text or 'all'} in arm {named[text].arm.name}" for text in reversed(named))
        text, each = next((text, each) for text, each in reversed(named.items()) if text)
        raise ConfigError(
            place(each.resolved.origins["launch.gpus"], "launch.gpus"), told,
            "the same in all arms: their runs share these GPUs out", f"name them for all: --launch.gpus {text}",
        )  # fmt: skip
    return next(iter(named))


def _given(arm: Arm, seed: int, common: Mapping[str, str]) -> dict[str, str]:
    """What is laid over an arm's file for one seed."""
    full = {SHORT_NAMES.get(key, key): value for key, value in common.items()}
    given = {"training.seed": str(seed), **full, **arm.settings}
    if not arm.is_plain:
        given["tracking.arm"] = arm.name
    return given


def arguments(entered: Entered, seed: int, profile: str | None, common: Mapping[str, str]) -> tuple[str, ...]:
    """What follows `python -m trainer run` for one seed of an arm; GPUs are dealt out, and not named here."""
    given = _given(entered.arm, seed, common)
    given.pop("launch.gpus", None)
    given["launch.nproc"] = str(entered.ranks)
    at = ("--profile", profile) if profile else ()
    return (entered.arm.strategy, *at, *(part for key, value in given.items() for part in (f"--{key}", value)))

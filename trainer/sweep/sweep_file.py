"""Reads a sweep from its YAML file: what is wrong in it is told with file and line before anything is trained."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import optuna

from trainer import names
from trainer.config.load import SHORT_NAMES, load
from trainer.config.places import find_sweep, shown_path
from trainer.config.problems import ConfigErrors, Problem, nearest, place, raise_if_any, shown
from trainer.config.resolved import Resolved
from trainer.config.source import Node, read_file
from trainer.errors import ConfigError
from trainer.runs import FREE
from trainer.sweep.axes import Findings, keys_of, read_axes, text_of
from trainer.sweep.space import SEED, STRATEGY, Axis, Choice, Choices, Value, grid, settings, size

GRID, OUTPUT_DIR = "grid", "training.output_dir"
SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
}
PRUNERS: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}
_KEYS = ("strategy", "profile", "settings", "space", "sampler", "trials", "seeds", "metric", "pruner")
_DEFAULT_SEED = 17
_MAX_POINTS = 1000
_CHECKED_POINTS = 100
"""Of a grid, whole configurations that are read beforehand, at 20 ms each; every value alone is read in any case."""


@dataclass(frozen=True, slots=True)
class Named:
    """One of Optuna's samplers or pruners, with options that its constructor takes."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is to be tried, checked."""

    name: str
    """Of the file, without folder and ending."""
    strategy: str | None
    """The configuration that points change; None where it is an axis itself."""
    profile: str | None
    fixed: Mapping[str, str]
    """Dotted key -> value as text, for every point."""
    axes: tuple[Axis, ...]
    """The last one of a grid is its seeds."""
    sampler: Named
    trials: int
    """How many points are tried: of a grid all, seeds counted."""
    output_dir: str | None
    """Where it was said: folder of all sweeps; None: that of the configuration."""
    metric: str
    pruner: Named

    @property
    def is_grid(self) -> bool:
        """Whether the points are known from the beginning."""
        return self.sampler.name == GRID

    @property
    def lower_is_better(self) -> bool:
        """Which way the metric goes."""
        return names.metric(self.metric).better == "lower"

    def of(self, point: Mapping[str, Value]) -> tuple[str, dict[str, str]]:
        """The configuration of a point, and what is changed of it.

        Args:
            point: a value for every axis.
        """
        changed = {**self.fixed, **settings(self.axes, point)}
        strategy = changed.pop(STRATEGY, self.strategy)
        assert strategy is not None  # noqa: S101  # `_strategy` has seen to it
        return strategy, changed

    def resolved(self, point: Mapping[str, Value]) -> Resolved:
        """The same as one checked configuration.

        Raises:
            ConfigError: this point cannot be trained.
        """
        strategy, changed = self.of(point)
        return load(strategy, profile=self.profile, overrides=changed)

    def first(self) -> dict[str, Value]:
        """Some point: what all have in common can be read off it."""
        return {axis.key: axis.ends()[0] for axis in self.axes}

    def facts(self) -> dict[str, Any]:
        """What makes two sweeps the same; the number of trials may grow where nothing else says when it is over."""
        axes = {
            axis.key: {choice.label: dict(choice.settings) for choice in axis.choices}
            if isinstance(axis, Choices)
            else {"low": axis.low, "high": axis.high, "log": axis.log, "whole": axis.whole}
            for axis in self.axes
        }
        sampler = {"name": self.sampler.name, **self.sampler.options}
        fixed = {key: text for key, text in self.fixed.items() if is_common(key)}
        return {
            "strategy": self.strategy, "profile": self.profile, "settings": fixed, "space": axes,
            "sampler": sampler, "metric": self.metric, "pruner": {"name": self.pruner.name, **self.pruner.options},
        }  # fmt: skip


def is_common(key: str) -> bool:
    """Whether a setting is the same for all workers of a sweep: not where they change no number, nor on which ranks.

    Args:
        key: dotted.
    """
    return key not in FREE and not key.startswith("launch.")


def read_sweep(
    file: str,
    *,
    profile: str | None = None,
    overrides: Mapping[str, str] | None = None,
    seeds: str | None = None,
    trials: str | None = None,
) -> Sweep:
    """Read a sweep's file, lay what the command line says over it, and check every value of its axes.

    Args:
        file: a path, or the name of a file in `experiments/sweeps/`.
        profile: instead of the file's.
        overrides: dotted key or short name -> value, for every point.
        seeds: comma-separated, instead of the file's.
        trials: how many, instead of the file's.

    Raises:
        ConfigError: anything wrong, with file and line.
    """
    path = find_sweep(file)
    root = read_file(path, shown_path(path)).root
    given = {SHORT_NAMES.get(key, key): text for key, text in (overrides or {}).items() if text != ""}
    on_line = {
        key: Node(value, f"--{key}")
        for key, value in (("profile", profile), ("seeds", _split(seeds)), ("trials", _number(trials)))
        if value not in (None, "")  # as MLproject has what is not given
    }
    reader = _Reader(Node({**(root.children or {}), **on_line}, root.origin), given)
    sweep = reader.sweep(path)
    reader.check(sweep)
    return sweep


def _split(text: str | None) -> Any:
    """A list; the text itself where it holds none, to be told as what it is."""
    return [_number(part) for part in (text or "").split(",") if part.strip()] or text


def _number(text: str | None) -> Any:
    """A whole number where it is one; else the text itself, which is then told as what it is."""
    return int(text) if text and text.strip().isdecimal() else text


class _Reader:
    """Takes a sweep out of the tree of its file, and collects what is wrong on the way."""

    def __init__(self, root: Node, given: Mapping[str, str]) -> None:
        self.root, self.given = root, given
        self.nodes = root.children or {}
        self.found = Findings()

    def sweep(self, path: Path) -> Sweep:
        """The sweep that the file holds.

        Raises:
            ConfigErrors: anything wrong in its own form.
        """
        for key in self.nodes:
            if key not in _KEYS:
                guess = nearest(key, _KEYS)
                self._wrong(key, shown(key), ", ".join(_KEYS), f"did you mean {guess}?" if guess else "take it out")
        fixed = {**self._fixed(), **self.given}
        output_dir = fixed.pop(OUTPUT_DIR, None)
        sampler = self._named("sampler", GRID, {GRID: None, **SAMPLERS})
        space = self.nodes.get("space", Node(None, self.root.origin))
        axes = read_axes(space, fixed, self.found, is_grid=sampler.name == GRID)
        strategy = self._strategy(axes)
        seeds = self._seeds(fixed)
        if sampler.name == GRID and seeds:
            axes += (Choices(SEED, tuple(Choice(str(seed), {SEED: str(seed)}) for seed in seeds)),)
        elif len(seeds) > 1:
            do = "give one; the best points can be run on other seeds afterwards, by a grid"
            self._wrong("seeds", f"{len(seeds)} of them", f"one with sampler {sampler.name}", do)
        elif seeds:
            fixed[SEED] = str(seeds[0])
        sweep = Sweep(
            name=path.stem, strategy=strategy, profile=self._text("profile"), fixed=fixed, axes=axes,
            sampler=sampler, trials=self._trials(axes, is_grid=sampler.name == GRID), metric=self._metric(),
            output_dir=output_dir, pruner=self._named("pruner", "none", PRUNERS),
        )  # fmt: skip
        raise_if_any(self.found.problems)
        return sweep

    def check(self, sweep: Sweep) -> None:
        """Read what the points mean: first the values of each axis, then, of a grid, many of its points.

        Raises:
            ConfigError: one of them cannot be trained; told at the place that sets what is wrong.
        """
        first = sweep.first()
        points = [first, *({**first, axis.key: value} for axis in sweep.axes for value in axis.ends())]
        if sweep.is_grid:
            points += islice(grid(sweep.axes), _CHECKED_POINTS)
        for point in points:
            try:
                sweep.resolved(point)
            except ConfigErrors as error:
                raise ConfigErrors([self._placed(p.where, p) for p in error.problems]) from None
            except ConfigError as error:
                found = Problem(error.where, error.got, error.allowed, error.do)
                raise ConfigErrors([self._placed(error.where, found)]) from None

    def _placed(self, where: str, problem: Problem) -> Problem:
        """A problem of an override of ours, at the line that has it."""
        key = where.removeprefix("-P ")
        known = key if where.startswith("-P ") else STRATEGY if where.startswith("configuration ") else ""
        if origin := self.found.places.get(known):
            return Problem(place(origin, key), problem.got, problem.allowed, problem.do)
        return problem

    def _wrong(self, key: str, got: str, allowed: str, do: str) -> None:
        self.found.wrong(self.nodes.get(key, self.root).origin, key, got, allowed, do)

    def _value(self, key: str, default: Any = None) -> Any:
        return self.nodes[key].plain() if key in self.nodes else default

    def _text(self, key: str) -> str | None:
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            self._wrong(key, shown(value), "a name", "name one")
            return None
        return value

    def _fixed(self) -> dict[str, str]:
        """Settings of every point."""
        node = self.nodes.get("settings")
        fixed = {}
        for key, leaf in node.leaves() if node and node.children else ():
            self.found.places[SHORT_NAMES.get(key, key)] = leaf.origin
            fixed[SHORT_NAMES.get(key, key)] = text_of(leaf.value)
        if node and not node.children:
            self._wrong("settings", shown(node.value), "a map of dotted keys", "write `training.vit_lr: 1.0e-4` below")
        return fixed

    def _strategy(self, axes: tuple[Axis, ...]) -> str | None:
        if "strategy" in self.nodes:
            self.found.places.setdefault(STRATEGY, self.nodes["strategy"].origin)
        named = self._text("strategy")
        swept = any(STRATEGY in keys_of(axis) for axis in axes)
        if swept == (named is not None) and "space" in self.nodes:
            got = f"{named}, and one in the space" if swept else "none"
            allowed = "the configuration that points change: here, or as an axis of the space"
            self._wrong("strategy", got, allowed, "name one, such as strategy: last6_lora")
        return named

    def _seeds(self, fixed: Mapping[str, str]) -> list[int]:
        if SEED in fixed:
            do = "use seeds instead: on the command line --seeds 17,18"
            self._wrong("seeds", f"{SEED}, set for every point", "seeds: [17, 18]", do)
            return []
        value = self._value("seeds", [_DEFAULT_SEED])
        seeds = [seed for seed in value if type(seed) is int and seed >= 0] if isinstance(value, list) else []
        if not seeds or len(set(seeds)) < len(value):
            self._wrong("seeds", shown(value), "a list of different whole numbers", "write seeds: [17, 18, 19]")
            return []
        return seeds

    def _trials(self, axes: tuple[Axis, ...], *, is_grid: bool) -> int:
        value = self._value("trials")
        if is_grid:
            if value is not None:
                self._wrong("trials", shown(value), "nothing: a grid has as many as points", "take it out")
            if size(axes) > _MAX_POINTS:
                do = "list fewer values, or say sampler: tpe and how many trials"
                self._wrong("space", f"{size(axes)} points with their seeds", f"at most {_MAX_POINTS} in a grid", do)
            return size(axes)
        if type(value) is not int or not 0 < value <= _MAX_POINTS:
            self._wrong("trials", shown(value), f"1 to {_MAX_POINTS}, how many points to try", "write trials: 20")
            return 1
        return value

    def _metric(self) -> str:
        metric = self._text("metric") or names.BEST_LOSS
        known = [name for name, meaning in names.METRICS.items() if meaning.better]
        if metric not in known and not metric.startswith(names.EVAL_LOSS_BY_DOMAIN):
            guess = nearest(metric, known)
            do = f"did you mean {guess}?" if guess else "name one of these"
            self._wrong("metric", shown(metric), ", ".join(known), do)
            return names.BEST_LOSS
        return metric

    def _named(self, key: str, default: str, known: Mapping[str, Callable[..., Any] | None]) -> Named:
        """A sampler or pruner, by name alone or with options."""
        value = self._value(key, default)
        options = dict(value) if isinstance(value, dict) else {}
        name = options.pop("name", None) if isinstance(value, dict) else value
        if name not in known:
            guess = nearest(str(name), known)
            do = f"did you mean {guess}?" if guess else "name one of these"
            self._wrong(key, shown(value), f"{', '.join(known)}; or a map of its name and options", do)
            return Named(default, {})
        make = known[name]
        takes = list(inspect.signature(make).parameters) if make else []
        if unknown := [option for option in options if option not in takes]:
            allowed = ", ".join(takes) or f"no options with {name}"
            guess = nearest(unknown[0], takes)
            self._wrong(key, shown(unknown[0]), allowed, f"did you mean {guess}?" if guess else "take it out")
        elif make:
            try:
                make(**options)
            except (TypeError, ValueError) as error:
                self._wrong(key, f"{shown(options)}: {error}", f"options of Optuna's {name}", "correct them")
        return Named(name, options)

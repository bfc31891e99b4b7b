"""Turns the raw form of a strategy, as existing files write it, into the same ordered rules over parameter names.

`tuner` names modules: by `target_regex` or `target_modules` those that get LoRA, by `modules_to_save` those that train
whole. PEFT matches such names by their ends, and takes what it finds; here every name becomes the full names of modules
that the model has, and what is not there is an error. Needs only names and shapes: no torch, no weights.
"""

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.config.problems import nearest, place, shown
from trainer.errors import StrategyError
from trainer.strategy import Method, Part, Rule, Shapes, part_of, unit_of

ALL_LINEAR = "all-linear"

FREEZE = {Part.LLM: ("freeze_llm", False), Part.VISION: ("freeze_vit", True), Part.ALIGNER: ("freeze_aligner", True)}
"""Part -> the key that keeps `target_modules` out of it, and what that key counts as where it is not written."""

_SECONDS = 5
"""A regular expression can take longer than anybody waits: each further character may double its time."""
_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|pos_embed)")
_HEAD = "lm_head"
_LISTED = 3


@dataclass(frozen=True, slots=True)
class RawStrategy:
    """What `tuner` says of one arm; see the keys of that name."""

    target_regex: str | None
    target_modules: tuple[str, ...] | None
    """None: `all-linear`."""
    modules_to_save: tuple[str, ...]
    freeze: Mapping[Part, bool | None]
    """Part -> whether `target_modules` leaves it out; None: as `FREEZE` says."""


def raw_rules(
    raw: RawStrategy, shapes: Shapes, *, origins: Mapping[str, str] | None = None
) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """The ordered rules that the raw form means for a model; the last one freezes all that is left.

    A module that both forms name trains whole: a low-rank change beside a free one adds nothing.

    Args:
        raw: the arm.
        shapes: full parameter name -> shape of the base model.
        origins: dotted key -> file and line, named in errors.

    Returns:
        The rules; and a line for each thing that was named and changes nothing.

    Raises:
        StrategyError: a name or the regular expression hits nothing that can be trained so, or is ambiguous.
    """
    naming = _Naming(shapes, origins or {})
    saved = naming.saved(raw.modules_to_save)
    if raw.target_regex:
        key, wrapped = "target_regex", naming.matched(raw.target_regex)
    else:
        key, wrapped = "target_modules", naming.named(raw.target_modules, _frozen(raw.freeze))
    twice = [module for module in wrapped if _lies_in(module, saved)]
    if twice:
        naming.note(key, f"{len(twice)} of its modules train whole, by tuner.modules_to_save: {_some(twice)}")
    adapted = [module for module in wrapped if module not in twice]
    if not saved and not adapted:
        raise StrategyError(
            naming.where(key),
            "no module that trains",
            "at least one module in tuner.modules_to_save or tuner.target_regex, or a part that is not frozen",
            "name what is to be trained",
        )
    rules = [
        *(Rule(pattern + r"\..+", Method.FULL) for pattern in _patterns(saved)),
        *(Rule(pattern + r"\.weight", Method.LORA) for pattern in _patterns(adapted)),
    ]
    return (*rules, Rule(r".+", Method.FROZEN)), tuple(naming.notes)


class _Naming:
    """What the names of a raw form mean in one model."""

    def __init__(self, shapes: Shapes, origins: Mapping[str, str]) -> None:
        self._origins = origins
        self.notes: list[str] = []
        self._leaves = dict.fromkeys(name.rpartition(".")[0] for name in shapes)  # modules that hold tensors themselves
        self._modules = dict.fromkeys(module for leaf in self._leaves for module in _with_parents(leaf))
        self._linear = dict.fromkeys(
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and not _EMBEDDING.fullmatch(name.removesuffix(".weight"))
        )

    def where(self, key: str) -> str:
        """File, line and key of what a message is about."""
        origin = self._origins.get(f"tuner.{key}", "default")
        return f"tuner.{key}" if origin == "default" else place(origin, f"tuner.{key}")

    def note(self, key: str, text: str) -> None:
        """Keep a line for the user."""
        self.notes.append(f"tuner.{key}: {text} ({self._origins.get(f'tuner.{key}', 'default')})")

    def saved(self, names: Iterable[str]) -> list[str]:
        """Full names of the modules that train whole, none inside another."""
        found = dict.fromkeys(self._saved(name) for name in names)
        return [module for module in found if not _lies_in(module, [other for other in found if other != module])]

    def _saved(self, name: str) -> str:
        """The module of a full name, with or without its leading `model.`, or of the end of exactly one full name."""
        same = [full for full in (name, f"model.{name}") if full in self._modules]
        hits = same[:1] or [module for module in self._modules if module.endswith(f".{name.removeprefix('model.')}")]
        if not hits:
            allowed, do = self._near(name)
            raise StrategyError(self.where("modules_to_save"), f"{shown(name)}, no module of this model", allowed, do)
        if len(hits) > 1:
            raise StrategyError(
                self.where("modules_to_save"),
                f"{shown(name)}, the end of {len(hits)} modules: {_some(hits)}",
                "full module names, or ends that only one module has",
                f"write the full names of those that are meant, such as {hits[-1]}",
            )
        unit = unit_of(f"{hits[0]}.weight")
        if unit not in (None, hits[0]):
            raise StrategyError(
                self.where("modules_to_save"),
                f"{shown(name)}, which lies inside {unit}",
                "a whole block, layer or merger, or a module outside of them",
                f"write {unit}, or give its linear layers LoRA",
            )
        return hits[0]

    def _near(self, name: str) -> tuple[str, str]:
        """What is allowed in place of a name that hits nothing, and what to do."""
        parent, _, index = name.rpartition(".")
        parents = (parent, f"model.{parent}")
        siblings = [module for module in self._modules if module.rpartition(".")[0] in parents]
        if index.isdigit() and siblings:
            return f"{siblings[0]} to {siblings[-1]}", "name modules that this model has"
        parts = name.removeprefix("model.").count(".") + 1
        ends = {".".join(module.removeprefix("model.").split(".")[-parts:]): module for module in self._modules}
        guess = nearest(name.removeprefix("model."), ends)
        listed = "full module names, such as model.visual.merger or model.visual.blocks.0"
        return listed, f"did you mean {ends[guess]}?" if guess else "correct the name"

    def matched(self, regex: str) -> list[str]:
        """Linear layers whose full name, with or without its leading `model.`, the expression matches as a whole.

        Raises:
            StrategyError: there is none, or matching takes too long.
        """
        try:
            with _at_most(_SECONDS):
                return self._matched(regex)
        except TimeoutError:
            raise StrategyError(
                self.where("target_regex"),
                f"{shown(regex)}, which is not through with the module names after {_SECONDS} s",
                "an expression without a repetition inside a repetition, such as (a+)+",
                "write the inner one without + or *",
            ) from None

    def _matched(self, regex: str) -> list[str]:
        caught = self._caught(re.compile(regex))
        linear = [module for module in caught if module in self._linear]
        if not linear:
            raise self._nothing_caught(regex, caught)
        if others := [module for module in caught if module in self._leaves and module not in self._linear]:
            self.note(
                "target_regex", f"{len(others)} of what it matches get no LoRA, no linear layers: {_some(others)}"
            )
        if idle := self._idle(regex, linear):
            self.note("target_regex", f"its alternatives {', '.join(map(shown, idle))} catch nothing more here")
        return linear

    def _caught(self, pattern: re.Pattern[str]) -> list[str]:
        return [m for m in self._modules if pattern.fullmatch(m) or pattern.fullmatch(m.removeprefix("model."))]

    def _nothing_caught(self, regex: str, caught: Sequence[str]) -> StrategyError:
        """The error of an expression that catches no linear layer, with the nearest one that there is."""
        inside = [module for module in self._linear if _lies_in(module, caught)]
        found = [module for module in self._linear if re.search(regex, module)]
        literal = re.sub(r"\\(.)|[\^$()?:*+]", lambda match: match[1] or "", regex)
        guess = nearest(literal, self._linear) or next(iter(self._linear))
        if caught:
            got = f"{shown(regex)} matches {len(caught)} of the modules and no linear layer: {_some(caught)}"
            do = (
                f"match the linear layers, such as {inside[0]}"
                if inside
                else "name such modules in tuner.modules_to_save"
            )
        else:
            blocks, layers = (self._count(of) for of in ("model.visual.blocks", "model.language_model.layers"))
            got = f"{shown(regex)} matches no module of this model with {blocks} vision blocks and {layers} LLM layers"
            do = f"it is only found inside {found[0]}: match the whole name" if found else f"compare it with {guess}"
        allowed = "an expression that matches whole names of linear layers, with or without their leading `model.`"
        return StrategyError(self.where("target_regex"), got, allowed, do)

    def _count(self, of: str) -> int:
        return sum(module.rpartition(".")[0] == of for module in self._modules)

    def _idle(self, regex: str, caught: Sequence[str]) -> list[str]:
        """Alternatives of the expression without which it catches the same; none inside another."""
        idle: list[str] = []
        end_of_last = 0
        for start, end in sorted(_alternatives(regex)):
            try:
                without = re.compile(f"{regex[:start]}(?!){regex[end:]}")
            except re.error:  # in a look-behind, say
                continue
            if start >= end_of_last and set(caught) <= set(self._caught(without)):
                idle.append(regex[start:end])
                end_of_last = end
        return idle

    def named(self, names: Sequence[str] | None, frozen: set[Part]) -> list[str]:
        """Linear layers of the parts that are not frozen: all of them, or those with one of these last names."""
        free = [module for module in self._linear if part_of(f"{module}.weight") not in frozen]
        found: dict[str, None] = {}
        for name in (ALL_LINEAR,) if names is None else names:
            if name == ALL_LINEAR:
                found |= dict.fromkeys(module for module in free if module != _HEAD)
                continue
            hits = [module for module in self._linear if f".{module}".endswith(f".{name}")]
            if not set(hits) & set(free):
                raise self._nothing_named(name, hits)
            found |= dict.fromkeys(module for module in hits if module in free)
        return [module for module in self._linear if module in found]

    def _nothing_named(self, name: str, elsewhere: Sequence[str]) -> StrategyError:
        """The error of a name that no linear layer of the parts that train has."""
        last = dict.fromkeys(module.rpartition(".")[2] for module in self._linear)
        if elsewhere:
            keys = dict.fromkeys(FREEZE[part_of(f"{module}.weight")][0] for module in elsewhere)
            got = f"{shown(name)}, which only frozen parts have: {_some(elsewhere)}"
            do = f"set tuner.{next(iter(keys))} to false (unset, freeze_vit and freeze_aligner count as true)"
        else:
            guess = nearest(name, [*last, ALL_LINEAR])
            got = f"{shown(name)}, the last name of no linear layer of this model"
            do = f"did you mean {guess}?" if guess else "correct the name"
        return StrategyError(self.where("target_modules"), got, f"{ALL_LINEAR}, {', '.join(last)}", do)


def _frozen(freeze: Mapping[Part, bool | None]) -> set[Part]:
    said = {part: freeze.get(part) for part in FREEZE}
    return {part for part, (_, unset) in FREEZE.items() if (unset if said[part] is None else said[part])}


def _with_parents(module: str) -> Iterator[str]:
    """A dotted name and the names of all modules that it lies in, the outermost first."""
    parts = module.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _lies_in(module: str, others: Iterable[str]) -> bool:
    """Whether a module is one of some others, or inside one."""
    return any(f"{module}.".startswith(f"{other}.") for other in others)


def _some(modules: Sequence[str]) -> str:
    return ", ".join(modules[:_LISTED]) + (" ..." if len(modules) > _LISTED else "")


def _patterns(modules: Iterable[str]) -> list[str]:
    """Regular expressions that together match these names and no others; one for all that differ in the index alone."""
    indices: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        whole = re.fullmatch(r"(.*?)(?:\.(\d+)(\..+)?)?", module)
        assert whole is not None  # noqa: S101  # it matches every name
        before, index, after = whole.groups("")
        indices.setdefault((before, after), []).append(index)
    return [
        re.escape(before) + (rf"\.({'|'.join(listed)})" if listed != [""] else "") + re.escape(after)
        for (before, after), listed in indices.items()
    ]


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so long; in a thread, where no alarm can be set, never."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _alternatives(regex: str) -> Iterator[tuple[int, int]]:
    """Start and end of everything that stands beside a `|`, in the whole expression and in each of its groups."""
    groups: list[list[int]] = [[0]]  # of each open group, where its alternatives start
    opening = re.compile(r"\(\?(P?<[^=!>][^>]*>|[^)<>P]*?:|<?[=!])|\(")
    at, in_set = 0, False
    while at < len(regex):
        character = regex[at]
        if character == "\\":
            at += 1
        elif in_set:
            in_set = character != "]"
        elif character == "[":
            in_set = True
            at += regex.startswith(("]", "^"), at + 1) + regex.startswith("^]", at + 1)  # a `]` that is meant itself
        elif character == "(" and (match := opening.match(regex, at)):
            groups.append([match.end()])
            at = match.end() - 1
        elif character == "|":
            groups[-1].append(at + 1)
        elif character == ")":
            yield from _pairs(groups.pop(), at)
        at += 1
    yield from _pairs(groups.pop(), at)


def _pairs(starts: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
    if len(starts) > 1:
        yield from zip(starts, [*(start - 1 for start in starts[1:]), end], strict=True)

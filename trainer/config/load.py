"""From files, a profile and overrides to one checked configuration that knows where each value comes from.

Later wins: `base.yaml` <- strategy file <- profile <- overrides.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import get_args

from pydantic import ValidationError

from trainer.config.compat import NO_EFFECT, ONE_LENGTH_KNOB, REGEX_DECIDES, SAMPLES_DECIDE
from trainer.config.fields import Section, section_of
from trainer.config.messages import field_of, from_pydantic, unknown_key
from trainer.config.parts import RAW_STRATEGY_KEYS
from trainer.config.places import (
    PATH_KEYS,
    experiments_dir,
    find_config,
    find_extended,
    find_profile,
    resolve,
    shown_path,
)
from trainer.config.problems import Problem, place, raise_if_any, shown
from trainer.config.resolved import Resolved, leaves
from trainer.config.schema import Config
from trainer.config.source import Node, Source, read_file, read_override
from trainer.errors import ConfigError

SHORT_NAMES: dict[str, str] = {
    "model": "model.model",
    "train_jsonl": "custom.train_jsonl",
    "val_jsonl": "custom.val_jsonl",
    "ood_jsonl": "custom.ood_jsonl",
    "taxonomy": "custom.taxonomy",
    "seed": "training.seed",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_train_epochs",
    "output_dir": "training.output_dir",
    "run_name": "training.run_name",
    "gpus": "launch.gpus",
}
"""What may be given as `-P seed=3` instead of `-P training.seed=3`."""

DEFAULT_PROFILE = "pocket"
"""The profile of the files in `experiments/` where none is named."""

_MAX_EXTENDS = 8
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # from an escape, or from bytes of the command line that are not UTF-8


@dataclass
class _Findings:
    """What is collected on the way, to be told in one go."""

    problems: list[Problem] = field(default_factory=list)
    no_effect: dict[str, str] = field(default_factory=dict)


def load(config: str | Path, *, profile: str | None = None, overrides: Mapping[str, str] | None = None) -> Resolved:
    """Read, compose and check a configuration.

    Args:
        config: path of a YAML file, or the name of one in the current directory or in `experiments/`.
        profile: a name in `experiments/profiles/`, the path of a YAML file, or `none`. None or empty: `pocket` for
            the files in `experiments/`, none for any other.
        overrides: dotted key or short name -> value as text; an empty value counts as not given.

    Raises:
        ConfigError: anything wrong, all of it in one message.
    """
    path = find_config(config)
    profile_name = _profile_name(path, profile)
    chain = _read_chain(path)
    profile_chain = _read_chain(find_profile(profile_name)) if profile_name else []
    found = _Findings()
    layers = [_pruned(source.root, found) for source in chain]
    profile_layers = [_pruned(source.root, found) for source in profile_chain]
    base = experiments_dir() / "base.yaml"
    of_strategy = [layer for source, layer in zip(chain, layers, strict=True) if source.path != base]
    found.problems += _conflicts(_merged(of_strategy), _merged(profile_layers))
    root = _merged([*layers, *profile_layers, *_override_layers(overrides or {}, found)])
    found.problems += _unusable_texts(root)
    root = _one_form_of_strategy(root, shown_path(base), found)
    root = _with_found_paths(root, [*chain, *profile_chain], path.parent, found)
    _one_cadence(root, shown_path(base), found)
    checked = _validated(root, found)
    _note_unused_length(root, shown_path(base), found)
    _note_unused_selection(root, found)
    warnings = [warning for source in [*chain, *profile_chain] for warning in source.warnings]
    if profile_name and not profile and checked.model.model != DEFAULT_PROFILE:
        warnings.append(_made_for_the_built_in_base(checked.model.model))
    tree = checked.model_dump(mode="json", by_alias=True)
    return Resolved(
        config=checked,
        name=path.stem,
        path=path,
        profile=profile_name,
        origins={key: _origin(root, key) for key, _ in leaves(tree)},
        no_effect=tuple(f"{key} ({origin})" for key, origin in found.no_effect.items()),
        warnings=tuple(dict.fromkeys(warnings)),
        tree=tree,
    )


def _profile_name(path: Path, profile: str | None) -> str | None:
    """Return the profile to use, with the default for files in `experiments/`."""
    if not profile:
        return DEFAULT_PROFILE if path.parent == experiments_dir() else None
    return None if profile == "none" else profile


def _made_for_the_built_in_base(model: str) -> str:
    """What is said where nobody has asked for the profile that a real model trains with."""
    return (
        f"profile {DEFAULT_PROFILE} is in force, whose rates, lengths and precision are for the built-in base, and the "
        f"model is {model}: --profile published is for a real Qwen3-VL, --profile none leaves all to your settings"
    )


def _read_chain(path: Path) -> list[Source]:
    """Read a file and what it extends, the one extended by all first."""
    chain: list[Source] = []
    while True:
        source = read_file(path, shown_path(path))
        chain.insert(0, source)
        extends = (source.root.children or {}).pop("extends", None)
        if extends is None:
            return chain
        path = find_extended(extends.value, source.path, place(extends.origin, "extends"))
        names = " extends ".join(item.shown for item in reversed(chain))
        if path in [item.path for item in chain]:
            raise ConfigError(extends.origin, f"{names} extends {shown_path(path)}", "no circle", "cut the circle")
        if len(chain) == _MAX_EXTENDS:
            raise ConfigError(extends.origin, f"{names} ...", f"at most {_MAX_EXTENDS} files", "merge some of them")


def _pruned(node: Node, found: _Findings, section: type[Section] = Config, prefix: str = "") -> Node:
    """Return the part of a tree that the schema knows; keys without effect are noted, unknown ones are problems."""
    kept: dict[str, Node] = {}
    for key, child in (node.children or {}).items():
        dotted = prefix + key
        known = section.model_fields.get(key)
        below = section_of(known.annotation) if known else None
        if dotted in NO_EFFECT:
            found.no_effect[f"{dotted}: {NO_EFFECT[dotted]}"] = child.origin
        elif known is None:
            found.problems.append(unknown_key(child.origin, dotted, section))
        elif below and child.children is not None:
            kept[key] = _pruned(child, found, below, dotted + ".")
        elif below and child.value is None and NoneType not in get_args(known.annotation):
            kept[key] = Node({}, child.origin)  # `training:` with nothing below it
        else:
            kept[key] = child
    return Node(kept, node.origin)


def _merged(layers: Sequence[Node]) -> Node:
    """Return the layers laid over each other: maps merge, everything else is replaced by the later one."""
    root = Node({}, "default")
    for layer in layers:
        root = _overlaid(root, layer)
    return root


def _overlaid(below: Node, above: Node) -> Node:
    """Return `below` with `above` laid over it."""
    if below.children is None or above.children is None:
        return above
    both = dict(below.children)
    for key, child in above.children.items():
        both[key] = _overlaid(both[key], child) if key in both else child
    return Node(both, above.origin)


def _conflicts(strategy: Node, profile: Node) -> list[Problem]:
    """Return a problem for each key that both a strategy file and a profile set."""
    if not profile.children:
        return []
    return [
        Problem(
            place(node.origin, key),
            f"a profile sets {key}, which {other.origin} sets too",
            "a strategy file says what is trained and how, a profile at what scale: no key in both",
            "take it out of one of them, or run with profile none",
        )
        for key, node in profile.leaves()
        for other_key, other in strategy.leaves()
        if key == other_key or key.startswith(other_key + ".") or other_key.startswith(key + ".")
    ]


def _override_layers(overrides: Mapping[str, str], found: _Findings) -> list[Node]:
    """Return each override as a tree of its own."""
    layers: list[Node] = []
    given: dict[str, str] = {}
    for name, text in overrides.items():
        key = SHORT_NAMES.get(name, name)
        if text == "":
            continue
        if given.setdefault(key, name) != name:
            found.problems.append(
                Problem(f"-P {name}", f"{key} given twice, as {given[key]} and {name}", "one of them", "leave one out")
            )
        try:
            node = _override(key, text)
        except ConfigError as error:
            found.problems.append(Problem(error.where, error.got, error.allowed, error.do))
            continue
        for part in reversed(key.split(".") if field_of(key) or key in NO_EFFECT else [key]):
            node = Node({part: node}, "-P")
        layers.append(_pruned_override(node, key, found))
    return layers


def _pruned_override(node: Node, key: str, found: _Findings) -> Node:
    """Return an override's tree when its key is known; else note the nearest known key."""
    if field_of(key) or key in NO_EFFECT:
        return _pruned(node, found)
    section: type[Section] = Config
    for part in key.split(".")[:-1]:
        known = section.model_fields.get(part)
        below = section_of(known.annotation) if known else None
        if below is None:
            break
        section = below
    found.problems.append(unknown_key("-P", key, section))
    return Node({}, "-P")


def _override(key: str, text: str) -> Node:
    """Return an override's value: as it stands where the schema wants text, else as YAML reads it."""
    known = field_of(key)
    kinds = get_args(known.annotation) if known else ()
    if known and (known.annotation is str or str in kinds or (kinds and all(isinstance(kind, str) for kind in kinds))):
        return Node(None if NoneType in kinds and text in ("null", "~") else text, "-P")
    return read_override(text, key)


def _unusable_texts(root: Node) -> list[Problem]:
    """Return a problem for each text that no file name, no database and no tokenizer takes."""
    return [
        Problem(
            place(node.origin, key), shown(text), "text without null characters and half surrogate pairs", "rewrite it"
        )
        for key, node in root.leaves()
        for text in (node.value if isinstance(node.value, list) else [node.value])
        if isinstance(text, str) and _UNUSABLE.search(text)
    ]


def _one_form_of_strategy(root: Node, base: str, found: _Findings) -> Node:
    """Return the tree without the strategy of `base.yaml` where `tuner` says it in the raw form; both is a problem."""
    tuner = (root.children or {}).get("tuner", root).children or {}
    raw = [(f"tuner.{key}", tuner[key]) for key in RAW_STRATEGY_KEYS if key in tuner]
    raw = [(key, node) for key, node in raw if node.value not in (None, [], "")]
    if not raw:
        return root
    strategy = (root.children or {}).get("strategy")
    key, node = raw[0]
    said = [
        (dotted, leaf)
        for dotted, leaf in (strategy.leaves("strategy") if strategy else [])
        if leaf.value is not None and not leaf.origin.startswith(base + ":")
    ]
    if said:
        found.problems.append(
            Problem(
                place(said[0][1].origin, said[0][0]),
                f"a strategy section, and {key} at {node.origin} which says the same in another form",
                "one of them; the strategy section is the one to keep",
                "take tuner's " + ", ".join(raw_key.removeprefix("tuner.") for raw_key, _ in raw) + " out",
            )
        )
    return _overlaid(root, Node({"strategy": Node(None, node.origin)}, root.origin))


def _with_found_paths(root: Node, sources: Sequence[Source], folder: Path, found: _Findings) -> Node:
    """Return the tree with its paths found and absolute; each one that is nowhere is a problem."""
    folders = {source.shown: source.path.parent for source in sources}
    for key in PATH_KEYS:
        section, name = key.split(".")
        if section == "deepspeed" and root.find((section,)).find(("enabled",)).value is not True:
            continue  # a file that nobody reads need not be there
        node = root.find((section,)).find((name,))
        if node.children is not None or not isinstance(node.value, str) or _origin(root, key) == "default":
            continue
        result = resolve(key, node.value, folders.get(node.origin.rpartition(":")[0], folder), node.origin)
        if isinstance(result, Problem):
            found.problems.append(result)
        else:
            root = _overlaid(root, Node({section: Node({name: Node(result, node.origin)}, node.origin)}, root.origin))
    return root


def _validated(root: Node, found: _Findings) -> Config:
    """Return the typed configuration, or raise everything found so far and by the schema."""
    try:
        checked = Config.model_validate(root.plain())
    except ValidationError as error:
        found.problems += from_pydantic(error, root)
        raise_if_any(found.problems)
        raise  # not reached: a ValidationError holds at least one error
    raise_if_any(found.problems)
    return checked


def _note_unused_length(root: Node, base: str, found: _Findings) -> None:
    """Note a `template.max_length` that `global_max_length` overrules."""
    length, one_knob = root.find(("template",)).find(("max_length",)), root.find(("global_max_length",))
    if not (isinstance(length.value, int) and isinstance(one_knob.value, int)):
        return
    default = Config.model_fields["template"].default.max_length
    if length.value not in (one_knob.value, default) and not length.origin.startswith(base + ":"):
        found.no_effect[f"template.max_length: {ONE_LENGTH_KNOB}"] = length.origin


def _one_cadence(root: Node, base: str, found: _Findings) -> None:
    """Note `training.eval_steps` where `eval_samples` takes its place; both from one hand are a problem."""
    by_steps, by_samples = _origin(root, "training.eval_steps"), _origin(root, "training.eval_samples")
    if not isinstance(root.find(("training",)).find(("eval_samples",)).value, int) or by_steps == "default":
        return
    if by_steps.rpartition(":")[0] == by_samples.rpartition(":")[0]:
        found.problems.append(
            Problem(
                place(by_samples, "training.eval_samples"),
                f"it, and training.eval_steps ({by_steps})",
                "evaluation by samples, or by optimizer steps",
                "keep one of the two",
            )
        )
    elif not by_steps.startswith(base + ":"):
        found.no_effect[f"training.eval_steps: {SAMPLES_DECIDE}"] = by_steps


def _note_unused_selection(root: Node, found: _Findings) -> None:
    """Note the keys that choose modules for LoRA where `tuner.target_regex` has chosen them."""
    tuner = root.find(("tuner",)).children or {}
    if "target_regex" not in tuner or not tuner["target_regex"].value:
        return
    for key in ("target_modules", "freeze_llm", "freeze_vit", "freeze_aligner"):
        if key in tuner and tuner[key].value is not None:
            found.no_effect[f"tuner.{key}: {REGEX_DECIDES}"] = tuner[key].origin


def _origin(root: Node, key: str) -> str:
    """Return where a value was written, or `default`."""
    node = root
    for part in key.split("."):
        if node.children is None or part not in node.children:
            return "default"
        node = node.children[part]
    return node.origin

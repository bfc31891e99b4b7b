"""YAML with line numbers: a file or an override as a tree whose every value knows where it was written."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config.problems import Problem, raise_if_any, shown
from trainer.errors import ConfigError

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]

_MAX_BYTES = 256 * 1024  # a pure-Python YAML parser reads this in about two seconds
_MAX_VALUES = 20_000  # counted after aliases are expanded: nine lines of YAML can mean a billion values
_MAX_DEPTH = 32
_MAX_NUMBER_CHARACTERS = 64

_TAG = "tag:yaml.org,2002:"
# YAML 1.1 as PyYAML reads it has three traps: `1e-4` is text, `18:23` is base 60 and `017` is base 8. Here the first is
# a number and the other two, like dates, are text, which a field that wants a number then refuses.
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class Reader(yaml.SafeLoader):
    """Composes nodes by our rules for numbers; constructs nothing."""


class Writer(yaml.SafeDumper):
    """Writes plain values so that `Reader` reads the same ones back."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out: a saved configuration has no anchors.

        Args:
            data: the value about to be written.
        """
        return True


def _text(writer: Writer, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks of Unicode as they are, and then reads them as spaces: escape them.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return writer.represent_scalar(_TAG + "str", text, style=style)


Writer.add_representer(str, _text)

for _yaml in (Reader, Writer):
    _yaml.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rules if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern in _NUMBERS.items():
        _yaml.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))


@dataclass(frozen=True, slots=True)
class Node:
    """A value and the place where it was written."""

    value: "Plain | dict[str, Node]"
    """A dict of nodes is a map of the configuration; everything else is plain (lists too, with what they hold)."""
    origin: str
    """`experiments/base.yaml:12`, `-P`, or `default`."""

    @property
    def children(self) -> "dict[str, Node] | None":
        """What the map holds; None for a plain value."""
        return self.value if isinstance(self.value, dict) else None  # type: ignore[return-value]  # maps hold nodes

    def leaves(self, prefix: str = "") -> "Iterator[tuple[str, Node]]":
        """Yield (dotted key, node) for each plain value and each empty map below.

        Args:
            prefix: dotted key of this node; empty at the top.
        """
        if not self.children:
            yield prefix, self
            return
        for key, child in self.children.items():
            yield from child.leaves(f"{prefix}.{key}" if prefix else key)

    def find(self, path: tuple[str | int, ...]) -> "Node":
        """Return the deepest node on a path of keys; itself where not even the first is there.

        Args:
            path: keys from here downwards.
        """
        if path and self.children and (child := self.children.get(str(path[0]))):
            return child.find(path[1:])
        return self

    def plain(self) -> Plain:
        """Return the value without the places."""
        if self.children is None:
            return self.value  # type: ignore[return-value]  # no nodes inside
        return {key: child.plain() for key, child in self.children.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """One file, read."""

    path: Path
    shown: str
    """How messages name the file."""
    root: Node
    warnings: tuple[str, ...]


def read_file(path: Path, name: str) -> Source:
    """Read one YAML file whose top is a map.

    Args:
        path: the file.
        name: how messages call it.

    Raises:
        ConfigError: unreadable, not UTF-8, not YAML, not a map, or more than a configuration can be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)  # no more of what may be a disk image, or have no end
        if len(data) > _MAX_BYTES:
            raise ConfigError(
                name, f"more than {_MAX_BYTES} bytes", f"at most {_MAX_BYTES} bytes", "give a configuration file"
            )
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"bytes that are not UTF-8 ({error})", "text in UTF-8", "save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(name, str(error.strerror), "a file that can be read", "check the file") from error
    walk = _Walk(name, None)
    top = _compose(text, walk)
    if not isinstance(top, yaml.MappingNode):
        got = "an empty file" if top is None else f"a {_kind_of(top)} at the top"
        raise ConfigError(
            f"{name}:1", got, "a map of sections, such as `training:`", "put the values in their sections"
        )
    root = walk.node(top, "", 0)
    raise_if_any(walk.problems)
    return Source(path, name, root, tuple(walk.warnings))


def read_override(text: str, key: str) -> Node:
    """Read the value of an override as YAML.

    Args:
        text: what was given for the key.
        key: the full dotted key, for messages.

    Raises:
        ConfigError: not YAML.
    """
    walk = _Walk(f"-P {key}", "-P")
    if len(text) > _MAX_BYTES:
        raise ConfigError(walk.name, f"{len(text)} characters", f"at most {_MAX_BYTES}", "use a file")
    top = _compose(text, walk)
    node = Node(None, "-P") if top is None else walk.node(top, key, 0)
    raise_if_any(walk.problems)
    return node


def _compose(text: str, walk: "_Walk") -> yaml.Node | None:
    """Parse text into YAML's own nodes, or raise one clear error."""
    try:
        loader = Reader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.context, error.problem) if part]
        do = "correct the YAML there"
        if "'\\t'" in (error.problem or ""):
            do = "replace the tab by spaces"
        raise ConfigError(walk.at(mark), " ".join(parts), "one YAML document", do) from error
    except yaml.YAMLError as error:
        raise ConfigError(walk.name, shown(str(error).replace("\n", " ")), "printable text", "take it out") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(walk.name, "YAML nested too deeply", f"at most {_MAX_DEPTH} levels", "simplify it") from error


class _Walk:
    """Turns YAML's nodes into ours, within bounds, and collects what is wrong on the way."""

    def __init__(self, name: str, origin: str | None) -> None:
        self.name, self.origin = name, origin
        self.warnings: list[str] = []
        self.problems: list[Problem] = []
        self.count = 0

    def at(self, mark: yaml.error.Mark | None) -> str:
        """Return the place of a mark as messages show it."""
        return self.name if mark is None or self.origin else f"{self.name}:{mark.line + 1}"

    def node(self, source: yaml.Node, key: str, depth: int, mark: yaml.error.Mark | None = None) -> Node:
        """Return `source` as a node that says it was written at `mark` (its key), or else at itself."""
        place = self.at(mark or source.start_mark)
        origin = self.origin or place
        self.count += 1
        if depth > _MAX_DEPTH or self.count > _MAX_VALUES:
            raise ConfigError(
                place, "a value nested in itself, too deeply or too often",
                f"at most {_MAX_DEPTH} levels and {_MAX_VALUES} values", "write the values out without aliases",
            )  # fmt: skip
        if isinstance(source, yaml.MappingNode) and source.tag == _TAG + "map":
            return Node(self._map(source, key, depth), origin)
        if isinstance(source, yaml.SequenceNode) and source.tag == _TAG + "seq":
            items = [self.node(item, f"{key}[{index}]", depth + 1) for index, item in enumerate(source.value)]
            return Node([item.plain() for item in items], origin)
        return Node(self._scalar(source, place, key), origin)

    def _map(self, source: yaml.MappingNode, key: str, depth: int) -> dict[str, Node]:
        """Return a map's nodes; of a key written twice the last counts, with one warning."""
        merged: dict[str, Node] = {}
        lines: dict[str, list[int]] = {}
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in source.value:
            if key_node.tag == _TAG + "merge":
                merged = {**self._merge_key(value_node, key, depth), **merged}
            elif not isinstance(key_node, yaml.ScalarNode):
                place = self.at(key_node.start_mark)
                self.problems.append(
                    Problem(place, f"a {_kind_of(key_node)} as a key", "a name", "write `name: value`")
                )
            else:
                pairs.pop(key_node.value, None)
                pairs[key_node.value] = (key_node, value_node)
                lines.setdefault(key_node.value, []).append(key_node.start_mark.line + 1)
        for name, (key_node, value_node) in pairs.items():
            dotted = f"{key}.{name}" if key else name
            if len(lines[name]) > 1:
                self.warnings.append(_duplicate(dotted, self.name, lines[name]))
            merged[name] = self.node(value_node, dotted, depth + 1, key_node.start_mark)
        return merged

    def _merge_key(self, source: yaml.Node, key: str, depth: int) -> dict[str, Node]:
        """Return what YAML's `<<` brings in: one map, or several of which the first wins."""
        found: dict[str, Node] = {}
        for item in source.value if isinstance(source, yaml.SequenceNode) else [source]:
            children = self.node(item, key, depth + 1).children
            if children is None:
                place = self.at(source.start_mark)
                self.problems.append(Problem(place, "`<<` with something else", "a map", "write `<<: *map`"))
            else:
                found = {**children, **found}
        return found

    def _scalar(self, source: yaml.Node, place: str, key: str) -> Plain:
        """Return text, number, boolean or null; any other tag is refused, so that no file makes objects."""
        text, kind = source.value, source.tag.removeprefix(_TAG)
        if isinstance(source, yaml.ScalarNode) and kind == "str":
            return str(text)
        try:
            if not isinstance(source, yaml.ScalarNode) or len(text) > _MAX_NUMBER_CHARACTERS:
                raise ValueError
            return _SCALARS[kind](text)
        except (KeyError, ValueError):
            what = shown(text)[:60] if isinstance(source, yaml.ScalarNode) else f"a {_kind_of(source)}"
            got = f"{what} with the tag {source.tag}"
            self.problems.append(
                Problem(f"{place}: {key}", got, "text, numbers, true, false, null, lists and maps", "write it plainly")
            )
            return None


def _boolean(text: str) -> bool:
    return {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}[text.lower()]


def _kind_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "plain value"
    return "list" if isinstance(node, yaml.SequenceNode) else "map"


_SCALARS: dict[str, Callable[[str], Plain]] = {
    "null": lambda text: None,
    "bool": _boolean,
    "int": lambda text: int(text.replace("_", ""), 16 if "x" in text else 10),
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower())),
}


def _duplicate(key: str, name: str, lines: list[int]) -> str:
    earlier = ", ".join(str(line) for line in lines[:-1])
    return f"{key} is written {len(lines)} times in {name}: lines {earlier} and {lines[-1]}; line {lines[-1]} counts"

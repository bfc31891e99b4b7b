"""A configuration with the origin of each value, and its forms for people, files and MLflow."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from trainer.config.schema import Config
from trainer.config.source import Plain, Writer


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What `load` returns: the typed configuration and where it comes from."""

    config: Config
    """The configuration, checked."""
    name: str
    """Name of the configuration file without folder and ending: the strategy's name."""
    path: Path
    """The configuration file, absolute."""
    profile: str | None
    """Name of the profile laid over it; None where there is none."""
    origins: Mapping[str, str]
    """Dotted key -> `experiments/base.yaml:12`, `-P`, or `default`."""
    no_effect: tuple[str, ...]
    """One line for each key that was accepted and changes nothing here, with the reason."""
    warnings: tuple[str, ...]
    """One line for each thing that is legal and probably not meant (a key written twice)."""
    tree: dict[str, Plain]
    """The configuration as plain maps, lists and values."""
    chosen: str = ""
    """How many ranks train, where that was left to the machine, and why; else empty."""

    @property
    def arm(self) -> str:
        """`last6_lora`; with `-P tuner.lora_rank=8`, `last6_lora+lora_rank=8`: no other arm must pass for this one.

        `tracking.arm` names it otherwise.
        """
        if self.config.tracking.arm:
            return self.config.tracking.arm
        params = self.params()
        changed = [
            f"+{key.rpartition('.')[2]}={params[key]}"
            for key, origin in self.origins.items()
            if origin == "-P" and key.startswith(("strategy.", "tuner."))
        ]
        return self.name + "".join(changed)

    def with_value(self, section: str, key: str, value: Plain, origin: str) -> "Resolved":
        """Return the same configuration with one value that was found out later.

        Args:
            section: a section of the top level.
            key: a key of it.
            value: already of the schema's type.
            origin: where it follows from.
        """
        part = getattr(self.config, section).model_copy(update={key: value})
        below = self.tree[section]
        assert isinstance(below, dict)  # noqa: S101  # a section
        return replace(
            self,
            config=self.config.model_copy(update={section: part}),
            origins={**self.origins, f"{section}.{key}": origin},
            tree={**self.tree, section: {**below, key: value}},
        )

    def lines(self) -> list[str]:
        """Return one line a value, `training.vit_lr: 0.00012   # experiments/last6_lora.yaml:14`, in schema order."""
        values = [(f"{key}: {_text(value)}", self.origins[key]) for key, value in leaves(self.tree)]
        width = min(60, max(len(text) for text, _ in values))
        return [f"{text:<{width}}   # {origin}" for text, origin in values]

    def to_yaml(self) -> str:
        """Return a YAML file that loads, without a profile, to an equal `Config`."""
        return yaml.dump(self.tree, Dumper=Writer, sort_keys=False, allow_unicode=True, width=120)

    def params(self) -> dict[str, str]:
        """Return dotted key -> text for MLflow: lists as JSON, null and booleans as JSON writes them."""
        return {key: value if isinstance(value, str) else _text(value) for key, value in leaves(self.tree)}


def leaves(tree: Mapping[str, Plain], prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield (dotted key, value) for each value of a plain tree; a list is one value.

    Args:
        tree: maps in maps.
        prefix: dotted key of `tree` itself, with its last dot.
    """
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Plain) -> str:
    return json.dumps(value, ensure_ascii=False)

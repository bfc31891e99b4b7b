"""The words that the model is given: system prompt in scheme A or B, user prompt, in Chinese or English."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.data.geometry import EmitNorm
from trainer.data.records import Task, text_problem
from trainer.errors import DataError

_MAX_BYTES = 256 * 1024  # of a taxonomy: far more than any model is told

Scheme = Literal["A", "B"]
Language = Literal["zh", "en"]


@dataclass(frozen=True)
class Taxonomy:
    """What scheme B tells the model about the domain.

    Attributes:
        types: the classes; the first element of a `desc`.
        attributes: each attribute's name with its possible values.
        rules: sentences of the domain, one rule each.
    """

    types: tuple[str, ...] = ()
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rules: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Taxonomy":
        """Read a YAML map with `types` (list), `attributes` (name: list of values) and `rules` (list).

        Args:
            path: the YAML file; keys that are left out count as empty.

        Returns:
            The taxonomy, in the order of the file.

        Raises:
            DataError: the file is missing, not YAML, or not of that form.
        """
        tree = _read_yaml(path)
        if not isinstance(tree, dict):
            raise _taxonomy_error(path, f"a {type(tree).__name__} where a map is needed")
        if unknown := set(tree) - {"types", "attributes", "rules"}:
            raise _taxonomy_error(path, f"unknown keys: {', '.join(sorted(map(str, unknown)))}")
        attributes = tree.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise _taxonomy_error(path, "`attributes` is not a map")
        names = _texts(path, "names of attributes", [*attributes])
        return cls(
            types=_texts(path, "types", tree.get("types")),
            attributes=tuple(
                (name, _texts(path, f"attributes.{name}", each))
                for name, each in zip(names, attributes.values(), strict=True)
            ),
            rules=_texts(path, "rules", tree.get("rules")),
        )


@dataclass(frozen=True)
class _Words:
    """One language's sentences; every prompt is put together from these."""

    output: str
    coordinates: Mapping[EmitNorm, str]
    order: str
    desc: str
    types: str
    attributes: str
    rules: str
    comma: str
    colon: str
    user_one: str
    user_many: str
    partly_visible: str
    summary: str
    summary_one: str
    summary_many: str


_EXAMPLE = '{{"image_1":{{"object_1":{{"bbox_2d":[x1,y1,x2,y2],"desc":"{desc}"}},...}},...}}'

_EN = _Words(
    output=(
        f"List every object in each image. Output one JSON object only: {_EXAMPLE.format(desc='type/attributes')}. "
        "Use bbox_2d, quad, poly or line (lines add line_points)."
    ),
    coordinates={
        "norm1000": "Coordinates are integers from 0 to 1000, relative to image size.",
        "norm100": "Coordinates are integers from 0 to 100, relative to image size.",
        "none": "Coordinates are integers in pixels.",
    },
    order=(
        "Order: number the objects of an image from top to bottom, and from left to right where they start at the "
        "same height; the upper left corner of the bounding box decides. A line starts at its leftmost end."
    ),
    desc=(
        "desc: parts separated by slashes: type / attributes / attributes that only this type has / remark. "
        "Separate attributes with commas. Leave out parts at the end that have nothing to say."
    ),
    types="Types: ",
    attributes="Attributes:",
    rules="Rules:",
    comma=", ",
    colon=": ",
    user_one="Describe all objects in this image.",
    user_many="Describe all objects in these {n} images.",
    partly_visible="partly visible",
    summary='Summarize each image. Output one JSON object only: {"image_1":"summary",...}.',
    summary_one="Summarize this image.",
    summary_many="Summarize each of these {n} images.",
)

_ZH = _Words(
    output=(
        f"找出每张图中的所有目标，只输出一个 JSON 对象：{_EXAMPLE.format(desc='类型/属性')}。"
        "几何形状用 bbox_2d、quad、poly 或 line 之一（line 另写 line_points，即点数）。"
    ),
    coordinates={
        "norm1000": "坐标为相对图像宽高的 0 到 1000 的整数。",
        "norm100": "坐标为相对图像宽高的 0 到 100 的整数。",
        "none": "坐标为像素整数。",
    },
    order="顺序：每张图的目标按外接框左上角从上到下编号，高度相同时从左到右。line 从最左端的点开始。",
    desc="desc：用斜杠分成若干部分：类型/属性/该类型特有的属性/备注。多个属性用逗号分开，末尾没有内容的部分省略。",
    types="类型：",
    attributes="属性：",
    rules="规则：",
    comma="、",
    colon="：",
    user_one="请描述这张图中的所有目标。",
    user_many="请描述这 {n} 张图中的所有目标。",
    partly_visible="部分可见",
    summary='概括每张图的内容，只输出一个 JSON 对象：{"image_1":"概括",...}。',
    summary_one="请概括这张图。",
    summary_many="请分别概括这 {n} 张图。",
)

_WORDS: dict[Language, _Words] = {"en": _EN, "zh": _ZH}


def system_prompt(
    scheme: Scheme,
    language: Language,
    emit_norm: EmitNorm,
    taxonomy: Taxonomy | None = None,
    task: Task = "dense",
) -> str:
    """The system prompt of every sample.

    Args:
        scheme: A states the output format only; B adds ordering rule, form of `desc`, taxonomy and domain rules.
        language: of the wording; the taxonomy is quoted as it is written.
        emit_norm: frame of the coordinates in the answer.
        taxonomy: used by scheme B; without one B ends after the form of `desc`.
        task: a summary has no coordinates, no order and no form of `desc`; B still adds the taxonomy.

    Returns:
        The text, without chat tokens.
    """
    words = _WORDS[language]
    if task == "summary":
        known = _taxonomy_lines(taxonomy or Taxonomy(), words) if scheme == "B" else []
        return "\n".join([words.summary, *known])
    joint = " " if language == "en" else ""
    lines = [words.output + joint + words.coordinates[emit_norm]]
    if scheme == "B":
        lines += [words.order, words.desc, *_taxonomy_lines(taxonomy or Taxonomy(), words)]
    return "\n".join(lines)


def user_prompt(language: Language, n_images: int = 1, task: Task = "dense") -> str:
    """The request that follows the images of one sample, without chat tokens."""
    words = _WORDS[language]
    one, many = (words.user_one, words.user_many) if task == "dense" else (words.summary_one, words.summary_many)
    return one if n_images == 1 else many.format(n=n_images)


def partly_visible(language: Language) -> str:
    """The attribute of an object of which an edge has cut something off."""
    return _WORDS[language].partly_visible


def _taxonomy_lines(taxonomy: Taxonomy, words: _Words) -> list[str]:
    lines = [words.types + words.comma.join(taxonomy.types)] if taxonomy.types else []
    if taxonomy.attributes:
        lines.append(words.attributes)
        lines += [f"- {name}{words.colon}{words.comma.join(values)}" for name, values in taxonomy.attributes]
    if taxonomy.rules:
        lines += [words.rules, *(f"- {rule}" for rule in taxonomy.rules)]
    return lines


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds, within bounds.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) <= _MAX_BYTES:
            return yaml.safe_load(data.decode("utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: bytes that are no text, the 31st of June
        raise _taxonomy_error(path, f"cannot be read: {error}") from error
    except RecursionError as error:
        raise _taxonomy_error(path, "cannot be read: nested too deeply") from error
    raise _taxonomy_error(path, f"more than {_MAX_BYTES} bytes")


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _taxonomy_error(path, f"`{key}` is not a list of texts but a {type(value).__name__}")
    for place, each in enumerate(value, 1):
        if not isinstance(each, str):
            # not what it holds: a few lines of YAML can mean a billion values
            got = f"item {place} is a {type(each).__name__} (quote numbers, yes, no, on and off)"
            raise _taxonomy_error(path, f"`{key}` is not a list of texts: {got}")
        if problem := text_problem(key, each):
            raise _taxonomy_error(path, f"item {place}: {problem}")
    return tuple(value)


def _taxonomy_error(path: Path, got: str) -> DataError:
    return DataError(
        where=str(path),
        got=got,
        allowed="a YAML map with `types` (list), `attributes` (name: list of values) and `rules` (list)",
        do="correct the taxonomy file, or leave it out",
    )

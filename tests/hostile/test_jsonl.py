"""Hostile records: mutated lines from reading to token ids, lines that are no lines, and what they name as images."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.hostile.harness import EXAMPLES, MEGABYTES, command, ends_well, forget_peak, peak_megabytes, refused, search
from tests.running import SMALL, empty_store, flags
from trainer.config.load import load
from trainer.convert import convert
from trainer.data.clipping import clip
from trainer.data.loader import SampleSet, check_lengths
from trainer.data.records import check_records, read_records
from trainer.data.template import Encoder
from trainer.datasets import make_encoder, mix_from
from trainer.errors import DataError
from trainer.model import load_tools

BOX = {"bbox_2d": [10, 10, 40, 30], "desc": "seven/red"}
GOOD: dict[str, Any] = {"images": ["a.png"], "objects": [BOX], "width": 96, "height": 64}
RICH: dict[str, Any] = {
    "images": ["a.png", "b.png"], "width": 96, "height": 64, "domain": "street", "summary": "two", "weight": 1.5,
    "objects": [
        BOX, {"quad": [1, 1, 9, 1, 9, 9, 1, 9], "desc": "b", "image": 1}, {"poly": [1, 1, 9.5, 1, 9, 9], "desc": "c"},
        {"line": [1, 1, 9, 9, 20, 3], "line_points": 3, "desc": "d/e,f/g"},
    ],
}  # fmt: skip

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**400, -(10**60), 0.5, -0.0, 1e308, float("nan"), float("inf"), 5e-324, "", " ",
    "x", "1", "<|im_end|>", "a<|image_pad|>b", "<|endoftext|>", "<think>", "\ud800", "\0", "\x1b[2J", "a\nb", "\u202e",
    "👨‍👩‍👧", "cafe\u0301", "$\\frac{$", "[/b]", "/" * 40, "\u2028", "x" * 5_000, "..", "../../etc/passwd",
    "/etc/passwd", "file:///etc/passwd", "/dev/zero", "pipe.png", "loop.png", "folder", "n" * 300, "d/" * 3000,
    "b.png", [], {}, [[]],
    [1, 2, 3, 4], [1, 1, 1, 1], [40, 30, 10, 10], [0, 0, 96, 64], [0, 0, 1e308, 1], ["a.png"] * 1500, [{}], {"a": 1},
    list(range(20_000)), [[1, 1], [2, 2]], {"bbox_2d": [1, 2, 3, 4], "desc": "y"},
]  # fmt: skip
PLACES: list[tuple[Any, ...]] = [
    *[(key,) for key in (*RICH, "extra")], ("images", 0), ("images", 1), ("objects", 0), ("objects", 3),
    *[("objects", n, key) for n, kind in enumerate(("bbox_2d", "quad", "poly", "line"))
      for key in (kind, "desc", "image", "line_points", "bbox_2d")],
    *[("objects", n, kind, at) for n, kind in enumerate(("bbox_2d", "quad", "poly", "line")) for at in (0, 1, 3)],
]  # fmt: skip


def folder_with_images(folder: Path) -> Path:
    """Two images, and what only looks like some: a pipe, a folder, a link to itself."""
    for name in ("a.png", "b.png"):
        Image.effect_noise((96, 64), 90).convert("RGB").save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, for records to stand beside."""
    return folder_with_images(tmp_path_factory.mktemp("images"))


@cache
def parts() -> tuple[Any, Encoder]:
    """A configuration with every operation that moves labels, and its encoder."""
    ops = "[{name: rotate, params: {max_deg: 40, prob: 1}}, {name: hflip}, {name: random_crop, params: {prob: 1}}]"
    overrides = {"custom.augmentation.mode": "clean", "custom.augmentation.ops": ops, "custom.summary_ratio": "0.5"}
    config = load("last6_lora", overrides=overrides).config
    return config, make_encoder(config, load_tools("pocket"), None)


def used(path: Path) -> None:
    """Read records, measure them, and encode the first as two epochs show it."""
    config, encoder = parts()
    records = check_lengths(read_records(path), encoder, summary_ratio=0.5)
    samples = SampleSet(records.records, encoder, mix_from(config, training=True))
    control = set(encoder.tokenizer.all_special_ids)
    for epoch in range(2):
        if samples.count(epoch):
            sample = samples[epoch, 0]
            assert control.isdisjoint(sample.input_ids[sample.supervised][:-1].tolist())  # the last one ends the answer
            assert int(sample.image_tokens.sum()) == len(sample.pixel_values) // 4


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A line with values at any place replaced, keys doubled, and now and then bytes changed."""
    tree = deepcopy(draw(st.sampled_from([GOOD, RICH])))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(PLACES))
        node: Any = tree
        for part in above:
            node = node[part] if _has(node, part) else None
        if isinstance(node, dict) or _has(node, last):
            node[last] = draw(st.sampled_from(HOSTILE) | st.floats() | st.integers() | st.text(max_size=12))
    line = json.dumps(tree, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line


def _has(node: Any, part: Any) -> bool:
    return (isinstance(node, dict) and part in node) or (
        isinstance(node, list) and isinstance(part, int) and part < len(node)
    )


def deep(levels: int) -> bytes:
    """A record in which lists lie in lists."""
    return json.dumps(GOOD | {"domain": "@"}).encode().replace(b'"@"', b"[" * levels + b"]" * levels)


@search(700)
@given(line=mutated())
@example(line=json.dumps(GOOD | {"images": ["n" * 300]}).encode())
@example(line=json.dumps(GOOD | {"images": ["\x1b[2J\n"]}).encode())
def test_a_mutated_record_ends_in_token_ids_or_in_one_message(images: Path, line: bytes) -> None:
    """What is read can be measured, changed and encoded, and no answer holds a token of the chat format."""
    path = images / "train.jsonl"
    path.write_bytes(line + b"\n")
    ends_well("records", lambda: used(path))


def test_nesting_at_the_edge_of_what_can_be_read_is_one_fault(images: Path) -> None:
    """JSON that is read with the last level of recursion cannot be written into a message with it."""
    path = images / "deep.jsonl"
    for levels in range(800, 1000):
        path.write_bytes(deep(levels) + b"\n")
        assert check_records(path).n_records == 1


# --- too much of everything ---------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)


def scrawl(points: int) -> list[float]:
    """A polygon with its corners anywhere."""
    return (RANDOM.random((points, 2)) * [96, 64]).round(3).ravel().tolist()


TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "objects": ({"objects": [BOX] * 100_000}, "100000 objects, more than 5000"),
    "bad objects": ({"objects": [{}] * 5_000}, "and 9980 more"),
    "images": ({"images": ["a.png"] * 100_000}, "100000 images, more than 1000"),
    "points": ({"objects": [{"poly": [1, 1] * 99_999 + [5, 9], "desc": "x"}]}, "100000 points, more than 5000"),
    "points of a line": ({"objects": [{"line": [1, 1, 2, 2] * 9_000, "desc": "x"}]}, "18000 points, more than 5000"),
    "letters": ({"objects": [BOX | {"desc": "x" * 10**7}]}, "`desc` has 10000000 characters, more than 4000"),
    "letters of a summary": ({"summary": "x" * 10**7}, "`summary` has 10000000 characters, more than 100000"),
    "weight": ({"weight": 10**300}, "`weight` must be a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_MUCH)
def test_more_than_any_sample_has_room_for_is_a_fault(images: Path, case: str) -> None:
    """Before a tokenizer or a drawing takes minutes for it."""
    changes, words = TOO_MUCH[case]
    path = images / "much.jsonl"
    path.write_text(json.dumps(GOOD | changes) + "\n")
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert words in caught.value.got and len(caught.value.got) < 5_000


NO_LINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a line of 100 MB": (
        lambda path: path.write_bytes(b'{"a":[' + b"[]," * 33_000_000 + b"1]}"), "line 1 is longer than 16,777,216",
    ),
    "a gibibyte of nothing": (lambda path: (path.touch(), os.truncate(path, 2**30)), "line 1 is longer than"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a folder": (Path.mkdir, "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "UTF-16": (lambda path: path.write_bytes((json.dumps(GOOD) + "\n").encode("utf-16")), "broken JSON ('utf-8'"),
    "old Macintosh lines": (lambda path: path.write_text(f"{json.dumps(GOOD)}\r" * 3), "Extra data"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_LINES)
def test_a_file_that_holds_no_lines_is_told_at_once(images: Path, tmp_path: Path, case: str) -> None:
    """In little memory, and nobody waits for a pipe."""
    make, words = NO_LINES[case]
    make(tmp_path / "train.jsonl")
    forget_peak()
    before = peak_megabytes()
    with pytest.raises(DataError, match=r"train\.jsonl") as caught:
        read_records(tmp_path / "train.jsonl")
    assert words in caught.value.got
    assert peak_megabytes() - before < 200


def test_a_hundred_thousand_records_of_one_image_are_small(images: Path) -> None:
    """A million take ten times as much: 1.3 GB, and a quarter of a minute."""
    path = images / "many.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n" * 100_000)
    forget_peak()
    before = peak_megabytes()
    assert len(read_records(path).records) == 100_000
    assert peak_megabytes() - before < MEGABYTES / 10


@pytest.mark.parametrize("points", [4, 30, 60, 500, 5_000])
def test_an_outline_that_crosses_itself_everywhere_is_cut_in_a_second(points: int) -> None:
    """Resolving all crossings of 500 random corners took minutes and gigabytes; past 300 its hull stands for it."""
    left, share = clip(scrawl(points), (48, 32), is_line=False)
    assert 0 < share < 1 and len(left) >= 6


# --- the command line ---------------------------------------------------------------------------------------------


def data(folder: Path, *lines: str) -> list[str]:
    """Records beside images, and the flags that name them."""
    folder_with_images(folder)
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return ["--train_jsonl", "t.jsonl", "--val_jsonl", "t.jsonl"]


def hostile_lines() -> list[str]:
    """Records with one hostile value each."""
    lines = []
    for place, value in zip(PLACES * 3, HOSTILE * 3, strict=False):
        tree = deepcopy(RICH)
        *above, last = place
        node: Any = tree
        for part in above:
            node = node[part]
        node[last] = value
        lines.append(json.dumps(tree))
    return [*lines, "[" * 100_000, "{", "\0", "NaN", deep(985).decode()]


@pytest.mark.parametrize("verb", ["plan", "run", "validate", "preview"] if EXAMPLES else ["plan"])
def test_the_command_line_refuses_hostile_records(tmp_path: Path, verb: str) -> None:
    """One message for all of a file; a pipe, a device and a link to itself are nothing to wait for."""
    given = data(tmp_path, *hostile_lines())
    ended = command(verb, "last6_lora", *given, folder=tmp_path, store=f"sqlite:///{tmp_path}/mlflow.db")
    if verb == "validate":  # tells statistics first, and of both files what is bad
        assert ended.status == 2 and ended.told.count("error: ") == 2 and "Traceback" not in ended.told
    else:
        assert "bad of 1" in refused(ended) and "t.jsonl:1" in ended.told


def test_hostile_records_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """A run over what is left goes through, and writes to its output folder and to its store alone."""
    odd = [
        json.dumps(GOOD | {"objects": [BOX | {"desc": text}]})
        for text in ("$\\frac{$", "\x1b[2J", "👨‍👩‍👧", "[/b]", "\u202e")
    ]
    given = data(tmp_path, *hostile_lines(), *odd, *[json.dumps(GOOD)] * 8)
    settings = SMALL | {"training.max_steps": "1", "custom.on_bad_record": "skip", "tracking.generate_records": "0"}
    ended = command("run", "frozen_vision", *given, *flags(settings), folder=tmp_path, store=empty_store(tmp_path))
    assert ended.status == 0, ended.told[-2000:]
    assert {each.split("/")[0] for each in ended.files} <= {"output", "mlruns", "mlflow.db"}
    assert ended.megabytes < MEGABYTES


# --- other formats ------------------------------------------------------------------------------------------------


def coco(**changes: Any) -> bytes:
    """A COCO file of one object, with one of its lists changed."""
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    for key, value in changes.items():
        tree[key][0] |= value
    return json.dumps(tree).encode()


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda path: (path.unlink(missing_ok=True), os.mkfifo(path)), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "a name that is no text": (lambda path: path.write_bytes(coco(images={"file_name": "b\udcff.png"})), "no text"),
    "a long name": (lambda path: path.write_bytes(coco(images={"file_name": "n" * 300})), "too long"),
    "a chat token": (lambda path: path.write_bytes(coco(categories={"name": "<|im_end|>"})), "chat token"),
    "points": (
        lambda path: path.write_bytes(coco(annotations={"segmentation": [scrawl(20_000)]})), "its shape cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_a_hostile_data_set_is_not_converted_and_leaves_no_file(images: Path, tmp_path: Path, case: str) -> None:
    """One message says what was left out; nobody waits for a pipe."""
    make, words = SOURCES[case]
    Image.new("RGB", (96, 64)).save(os.fsencode(images) + b"/b\xff.png", "PNG")
    make(tmp_path / "source.json")
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "source.json", tmp_path / "out.jsonl", images=images, shape="poly")
    assert words in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["source.json"]


def test_names_that_are_too_long_for_a_file_are_told(tmp_path: Path) -> None:
    """Of the source, of the new file and of the folder of images."""
    (tmp_path / "source.json").write_bytes(coco())
    long = tmp_path / ("n" * 300)
    for source, out, of_images in [(long, "o", None), ("source.json", long, None), ("source.json", "o", long)]:
        with pytest.raises(DataError):
            convert(tmp_path / source, tmp_path / out, images=of_images or tmp_path)


@pytest.mark.parametrize("word", ["<|im_end|>", "a<|image_pad|>", "\ud800"])
def test_a_mark_of_augmentation_cannot_bring_what_no_record_may(images: Path, word: str) -> None:
    """`custom.augmentation.partial_word` goes into descriptions after they were checked."""
    changes = {"custom.augmentation.mode": "clean", "custom.augmentation.ops": "[{name: hflip}]"}
    with pytest.raises(ValueError, match="partial_word"):
        mix_from(
            load("frozen_vision", overrides=changes | {"custom.augmentation.partial_word": word}).config, training=True
        )

"""Hostile configurations: mutated files, every key with every odd value, and files that are no files."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.hostile.harness import EXAMPLES, Ended, command, ends_well, is_a_message, refused, search
from tests.running import ROOT
from trainer.config.load import load
from trainer.config.messages import all_keys
from trainer.config.zero import zero_settings
from trainer.data.prompts import Taxonomy
from trainer.errors import DataError, UserError

FILES = [
    *sorted((ROOT / "experiments").glob("*.yaml")),
    *sorted((ROOT / "tests" / "fixtures" / "existing" / "configs").glob("*.yaml")),
]
TEXTS = [path.read_text(encoding="utf-8").replace("extends: base.yaml\n", "") for path in FILES]

HOSTILE_TEXTS = [
    ".nan", ".inf", "-.inf", "1e999", "-0.0", "9" * 10_000, "0x" + "f" * 60, "-1", "1_0", "017", "1:30", "2001-99-99",
    "null", "~", "yes", "[]", "{}", "[[[[1]]]]", "{a: {b: 1}}", "''", "!!python/object/apply:os.system [ls]",
    "!!python/name:os.system", "!!binary x", "!!set {a}", "!x y", "*gone", "&a [*a]", "<<: *a", "? [a]", "- -", "|",
    "'open", '"\\ud800"', '"\\0"', '"~\\ud800/x"', '"\\e[2J\\n"', "%TAG ! x", "---", "...", "\t", "\ufeff", "# c",
    "/dev/zero", "../../..", "~root", "$(ls)", "`ls`", "((((a+)+)+)+)$", "last-0", "0-99999", "1,1", "\u202e", "😀",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A real file with lines and values exchanged, doubled, left out, indented otherwise, or replaced by odd ones."""
    lines = draw(st.sampled_from(TEXTS)).splitlines()
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(lines) - 1)) if lines else 0
        match draw(st.sampled_from(["value", "line", "swap", "double", "out", "indent", "letter"])), lines:
            case _, []:
                lines = [draw(st.sampled_from(HOSTILE_TEXTS))]
            case "value", _:
                lines[at] = re.sub(r":.*", ": ", lines[at], count=1) + draw(st.sampled_from(HOSTILE_TEXTS))
            case "line", _:
                lines.insert(at, draw(st.sampled_from(HOSTILE_TEXTS)))
            case "swap", _:
                other = draw(st.integers(0, len(lines) - 1))
                lines[at], lines[other] = lines[other], lines[at]
            case "double", _:
                lines[at:at] = [lines[at]] * draw(st.integers(1, 20))
            case "out", _:
                del lines[at : at + draw(st.integers(1, 5))]
            case "indent", _:
                lines[at] = " " * draw(st.integers(0, 5)) + lines[at].lstrip(" ")
            case _, _:
                place = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:place] + draw(st.characters(codec="utf-8")) + lines[at][place + 1 :]
    return "\n".join(lines) + "\n"


@search(300)
@given(text=mutated(), encoding=st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32", "gb18030"]))
@example(text='custom:\n  train_jsonl: "~\\ud800/x"\n  val_jsonl: x\n', encoding="utf-8")
@example(text='"a\\e[2J\\n": 1\n', encoding="utf-8")
@example(text='custom: {augmentation: {ops: [{name: "a\\e[2J"}]}}\n', encoding="utf-8")
@example(text='custom: {augmentation: {ops: [{name: hflip, params: {"a\\e[2J": 1}}]}}\n', encoding="utf-8")
@example(text='extends: "a\\e[2J\\n"\n', encoding="utf-8")
def test_a_mutated_configuration_ends_in_success_or_in_one_message(tmp_path: Path, text: str, encoding: str) -> None:
    """Whatever was exchanged, and in whichever encoding it was saved; the message can be shown on a terminal."""
    path = tmp_path / "their.yaml"
    path.write_bytes(text.encode(encoding, "replace"))
    ends_well("configurations", lambda: load(path))
    assert [each.name for each in tmp_path.iterdir()] == ["their.yaml"]


def in_its_section(key: str, value: str) -> str:
    """A key with its value as a file has them."""
    *above, last = key.split(".")
    nested = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(above)) + "  " * len(above)
    return f"{nested}{last}: {value}\n"


@pytest.mark.parametrize("value", HOSTILE_TEXTS, ids=lambda value: value[:20].encode("unicode_escape").decode())
def test_every_key_with_an_odd_value(tmp_path: Path, value: str) -> None:
    """Each in a file of its own, and all at once as overrides; a short search takes every seventh key."""
    path, keys = tmp_path / "their.yaml", sorted(all_keys())
    for key in keys if EXAMPLES else keys[HOSTILE_TEXTS.index(value) % 7 :: 7]:
        path.write_text(in_its_section(key, value), encoding="utf-8")
        ends_well("one key", lambda: load(path))
    ends_well("all overrides", lambda: load("frozen_vision", overrides=dict.fromkeys(keys, value)))


@pytest.mark.parametrize("key", ["training.output_dir", "training.run_name", "custom.train_jsonl", "model.model"])
@pytest.mark.parametrize("escape", [r"a\0b", r"a\ud800b"])
def test_text_that_no_file_name_can_hold_is_refused(tmp_path: Path, key: str, escape: str) -> None:
    """Before a folder of that name is made: only an escape brings such a letter into a file."""
    section, name = key.split(".")
    (tmp_path / "x.yaml").write_text(f'{section}: {{{name}: "{escape}"}}\n')
    with pytest.raises(UserError, match="null characters and half surrogate pairs") as caught:
        load(tmp_path / "x.yaml")
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("launch.nproc", 10**9),
        ("data.dataloader_num_workers", 10**9),
        ("custom.digits.train", 10**9),
        ("custom.digits.val", 10**9),
        ("custom.digits.ood", 10**9),
    ],
)
def test_numbers_that_would_bring_the_machine_down_are_refused(key: str, value: int) -> None:
    """A billion processes, a billion files."""
    with pytest.raises(UserError, match="at most") as caught:
        load("frozen_vision", overrides={key: str(value)})
    assert key in str(caught.value)


# --- files that are no files, through the command line ------------------------------------------------------------


def write(folder: Path, text: str, name: str = "their.yaml") -> str:
    """A file of the folder, and its name."""
    (folder / name).write_text(text, encoding="utf-8")
    return name


def sparse(folder: Path) -> str:
    """A gibibyte that takes no room on disk."""
    with (folder / "large.yaml").open("wb") as file:
        file.truncate(2**30)
    return "large.yaml"


def pipe(folder: Path) -> str:
    """Which nobody writes to."""
    os.mkfifo(folder / "pipe.yaml")
    return "pipe.yaml"


def chain(folder: Path, count: int, body: str = "") -> str:
    """Files that extend each other."""
    for number in range(count):
        write(folder, f"extends: {number + 1}.yaml\n{body}", f"{number}.yaml")
    return "0.yaml"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
DOUBLE = "training: {seed: 1}\n" * 4_000

NO_FILES: dict[str, tuple[Callable[[Path], str], str]] = {
    "a gibibyte": (sparse, "more than 262144 bytes"),
    "a pipe": (pipe, "no such file"),
    "a folder": (lambda folder: str(folder), "no such file"),
    "a device": (lambda folder: "/dev/zero", "no such file"),
    "extends a gibibyte": (lambda folder: write(folder, f"extends: {sparse(folder)}\n"), "more than 262144 bytes"),
    "extends a pipe": (lambda folder: write(folder, f"extends: {pipe(folder)}\n"), "extends: 'pipe.yaml'"),
    "extends a folder": (lambda folder: write(folder, "extends: .\n"), "extends: '.'"),
    "extends a device": (lambda folder: write(folder, "extends: /dev/zero\n"), "extends: '/dev/zero'"),
    "extends itself": (lambda folder: write(folder, "extends: their.yaml\n"), "no circle"),
    "extends a thousand files": (lambda folder: chain(folder, 1000), "at most 8 files"),
    "extends eight slow files": (lambda folder: chain(folder, 9, DOUBLE), "at most 8 files"),
    "a bomb": (lambda folder: write(folder, BOMB), "nested in itself"),
    "an object": (lambda folder: write(folder, "a: !!python/object/apply:os.system [touch x]\n"), "tag"),
    "a name with a line break": (lambda folder: write(folder, "training: {a: 1}\n", "a\n\x1b[2J.yaml"), r"a\n\x1b[2J"),
    "broken, of such a name": (lambda folder: write(folder, "a: [", "a\n\x1b[2J.yaml"), r"a\n\x1b[2J"),
    "ten thousand levels": (lambda folder: write(folder, "a: " + "[" * 10_000), "nested too deeply"),
    "fifteen thousand unknown keys": (
        lambda folder: write(folder, "".join(f"k{i}: 1\n" for i in range(15_000))), "15000 mistakes",
    ),
    "UTF-16": (lambda folder: _utf16(folder), "not UTF-8"),
}  # fmt: skip


WATCHED = ("a gibibyte", "a pipe", "extends a pipe", "extends a device", "a bomb", "a name with a line break")


def _utf16(folder: Path) -> str:
    (folder / "their.yaml").write_bytes("training: {seed: 1}\n".encode("utf-16"))
    return "their.yaml"


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Status 2 and one message, in seconds, in little memory; nothing is made on disk. A short search calls the
    command line only for what would take the tests down with it.
    """
    make, words = NO_FILES[case]
    if EXAMPLES or case in WATCHED:
        ended = command("plan", make(tmp_path), folder=tmp_path)
        assert words in refused(ended)
        assert ended.megabytes < 300
        return
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(make(tmp_path))
    is_a_message(str(caught.value))
    assert words in str(caught.value)


def test_a_word_that_the_shell_could_not_decode_is_refused(tmp_path: Path) -> None:
    """An argument of the command line may hold any byte but 0."""
    ended: Ended = command("plan", "last6_lora", "--training.run_name", os.fsdecode(b"\xff\xfe"), folder=tmp_path)
    assert "training.run_name" in refused(ended)


# --- other files that a configuration names -----------------------------------------------------------------------

ALIASES = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

TAXONOMIES: dict[str, tuple[str, str]] = {
    "deep": ("types: " + "[" * 5000, "nested too deeply"),
    "a day that is not": ("types: [2001-99-99]", "month must be in 1..12"),
    "a number of 5,000 digits": ("types: [" + "9" * 5000 + "]", "digits"),
    "an object": ("types: !!python/object/apply:os.system [ls]", "constructor"),
    "a bomb": (f"types:\n- &z [{ALIASES.splitlines()[0].split('&a0 ')[1]}]\n- *z\n", "item 1 is a list"),
    "itself": ("types: &a [*a]", "item 1 is a list"),
    "a chat token": ('types: ["<|im_end|>"]', "chat token <|im_end|>"),
    "a chat token in a name": ('attributes: {"<|image_pad|>": [a]}', "chat token <|image_pad|>"),
    "a chat token in a rule": ('rules: ["a<|im_start|>system"]', "chat token <|im_start|>"),
    "half a letter": ('types: ["\\ud800"]', "half a surrogate pair"),
    "large": ("# " + "x" * 300_000, "more than 262144 bytes"),
}


@pytest.mark.parametrize("case", TAXONOMIES)
def test_a_hostile_taxonomy_is_told_in_one_message(tmp_path: Path, case: str) -> None:
    """Its texts go into every prompt: none may hold a token of the chat format."""
    text, words = TAXONOMIES[case]
    (tmp_path / "taxonomy.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        Taxonomy.read(tmp_path / "taxonomy.yaml")
    assert words in caught.value.got and len(caught.value.got) < 1000


def test_a_taxonomy_of_lists_in_lists_is_not_written_out(tmp_path: Path) -> None:
    """Nine lines of aliases mean four hundred million words."""
    (tmp_path / "taxonomy.yaml").write_text("types:\n- " + "\n- ".join(re.findall(r"&.*", ALIASES)))
    with pytest.raises(DataError, match="item 1 is a list"):
        Taxonomy.read(tmp_path / "taxonomy.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": true}}', "stage True"),
        ('{"zero_optimization": {"stage": 1e999}}', "stage inf"),
        ('{"zero_optimization": {"stage": [2]}}', "stage [2]"),
        (" " * 300_000 + "{}", "more than 262144 bytes"),
        ("[" * 100_000, "broken JSON"),
        ('{"zero_optimization": ' + "9" * 5000 + "}", "broken JSON"),
        ("\xff", "broken JSON"),
    ],
    ids=["true", "infinite", "a list", "large", "open", "digits", "latin-1"],
)
def test_a_hostile_deepspeed_file_is_told_in_one_message(tmp_path: Path, text: str, words: str) -> None:
    """`deepspeed.config` names a JSON file of the user."""
    (tmp_path / "zero.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        zero_settings(str(tmp_path / "zero.json"), "their.yaml:1")
    is_a_message(str(caught.value))
    assert words in str(caught.value)


def test_a_deepspeed_file_of_any_depth_ends_well(tmp_path: Path) -> None:
    """What is read with the last level of recursion is gone through with it, too."""
    for levels in range(400, 1000, 2):
        text = '{"zero_optimization": {"stage": 2, "x": ' + '{"a":' * levels + "1" + "}" * levels + "}}"
        (tmp_path / "zero.json").write_text(text)
        ends_well("DeepSpeed", lambda: zero_settings(str(tmp_path / "zero.json"), "their.yaml:1"))

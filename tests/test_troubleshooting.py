"""The page on troubleshooting tells the truth: every message it quotes is in the source, and some are really given."""

import ast
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlflow
import pytest
import torch

from analysis import __main__ as analysis_command
from tests.running import ROOT
from trainer import __main__ as trainer_command
from trainer.data.records import read_records
from trainer.errors import TrainingStopped, UserError
from trainer.gate import Gate
from trainer.hosts.hostfile import hosts_from
from trainer.inference.image_files import find_images
from trainer.launch import join
from trainer.model import TrainedTensor
from trainer.strategy import Method, Part

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS = tuple(path for package in ("trainer", "analysis") for path in (ROOT / package).rglob("*.py"))
OTHERS = tuple((Path(mlflow.__file__).parent / "projects").glob("*.py"), )  # fmt: skip
HOLE = "\0"
"""Stands in a text of the source for a value that is not known there."""


def rows(first: str) -> list[list[str]]:
    """The rows of all tables of the page whose first column has this header."""
    found: list[list[str]] = []
    inside = False
    for line in PAGE.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not set(cells[0]) <= {"-"}:
            found.append(cells)
    return found


def quoted(first: str) -> list[str]:
    """The messages in the first column of these rows."""
    return [message for row in rows(first) for message in re.findall(r"`([^`]+)`", row[0])]


def pattern(message: str) -> re.Pattern[str]:
    """What the text of a message has to look like: `…` is anything."""
    return re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)


def texts_of(path: Path) -> list[str]:
    """Every text of a module but its docstrings and comments, f-strings with a hole for each value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            node.body = [child for child in node.body if not _is_docstring(child)]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else HOLE for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def texts(paths: tuple[Path, ...]) -> list[str]:
    """Of some modules."""
    return [text for path in paths for text in texts_of(path)]


def test_the_page_has_messages_in_every_group() -> None:
    """Twelve groups; a table that is not read would be held to nothing."""
    groups = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert len(groups) == 12 and "The environment" in groups
    assert len(quoted("message")) > 120 and len(quoted("finding")) >= 8
    assert all(len(row) == 3 and all(row) for row in rows("message"))


@pytest.mark.parametrize("message", quoted("message") + quoted("finding"))
def test_a_message_of_the_page_is_one_text_of_the_source(message: str) -> None:
    """With its words in their order; a changed message is a changed page."""
    assert sum(map(str.isalpha, message)) >= 4
    assert any(pattern(message).search(text) for text in texts(OURS)), message


@pytest.mark.parametrize("message", quoted("message of MLflow"))
def test_a_message_of_mlflow_is_one_of_the_version_that_is_pinned(message: str) -> None:
    """In its projects, or in what makes environments for them."""
    paths = (*OTHERS, Path(mlflow.__file__).parent / "utils" / "conda.py")
    assert any(pattern(message).search(text) for text in texts(paths)), message


# --- really given -------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command in this process, in an empty folder, and returns the message that it was refused with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")

    def run(package: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [package, *arguments])
        if package == "trainer":
            assert trainer_command._status() == 2
        else:
            with pytest.raises(SystemExit, match="2"):
                analysis_command.main()
        return capsys.readouterr().err

    return run


COMMANDS = {
    "…, a key that nobody knows": ["trainer", "plan", "last6_lora", "--training.lernin_rate", "1"],
    "no such file; tried …": ["trainer", "plan", "last6_lroa"],
    "a whole number": ["trainer", "plan", "last6_lora", "--training.eval_steps", "often"],
    "…: no such model": ["trainer", "plan", "last6_lora", "--model", "./no/model"],
    "… given twice, as … and …": ["trainer", "plan", "last6_lora", "--seed", "1", "--training.seed", "2"],
    "… mistakes in the configuration": ["trainer", "plan", "last6_lora", "--tuner.lora_rank", "0", "--a.b", "1"],
    "custom.… without custom.…": ["trainer", "plan", "last6_lora", "--custom.train_jsonl", "x"],
    "expected --section.key VALUE (see --help)": ["trainer", "plan", "last6_lora", "training.seed=3"],
    "… more than once": ["trainer", "compare", "--strategies", "last6_lora,last6_lora", "--dry_run"],
    "evaluation by optimizer steps, which are not equal work for arms that accumulate differently": [
        "trainer", "compare", "--policy", "halving", "--training.eval_steps", "5", "--dry_run",
    ],
    "a SQLite file that is not there": ["analysis", "rank"],
}  # fmt: skip
"""Message of the page -> command that is refused with it."""


@pytest.mark.parametrize("message", COMMANDS)
def test_a_command_is_refused_as_the_page_says(message: str, said: Callable[..., str]) -> None:
    """In four parts, on standard error, with status 2."""
    assert message in quoted("message")
    package, *arguments = COMMANDS[message]
    if message.startswith("custom."):
        Path("x").write_text("")
    told = said(package, *arguments)
    assert pattern(message).search(told), told
    assert "Traceback" not in told and (" got: " in told or "expected" in message)


def given(make: Callable[[], object], kind: type[Exception]) -> str:
    """The message that something is refused with."""
    with pytest.raises(kind) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ("no json", [": broken JSON (…)"]),
        (
            '{"images": ["a.png"], "width": 4, "height": 4, "objects": [{"bbox_2d": [1, 1, 9, 3], "desc": "x"}, '
            '{"bbox_2d": [3, 3, 1, 1], "desc": "x"}, {"desc": "x"}, {"bbox_2d": [1, 1, 2, 2], "desc": "<|im_end|>"}]}',
            [
                "… is outside the image of … pixels",
                "… is empty (x1 < x2 and y1 < y2 are needed)",
                "…; exactly one of … is needed",
                "holds the chat token …",
                "no such file",
            ],
        ),
    ],
)
def test_bad_records_are_named_as_the_page_says(line: str, messages: list[str], tmp_path: Path) -> None:
    """All in one message, below the count."""
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    told = given(lambda: read_records(tmp_path / "bad.jsonl"), UserError)
    for message in ["… bad of … records:", *messages]:
        assert message in quoted("message")
        assert pattern(message).search(told), told


def test_the_gate_speaks_as_the_page_says() -> None:
    """Of a tensor without a gradient, and of one whose gradient is zero."""
    tensors = [
        TrainedTensor(name, name, Part.VISION, Method.FULL, torch.nn.Parameter(torch.ones(2)), behind_zero=False)
        for name in ("cut", "dead")
    ]
    gradients = {"cut": None, "dead": torch.zeros(2)}
    gate = Gate(tensors, {}, last_look=1)
    told = given(lambda: gate.before_update(1, lambda tensor: gradients[tensor.name]), TrainingStopped)
    for message in (
        "The training gate looked at the … of step … and found:",
        "planned …, but it has no gradient",
        "planned …, but its gradient is zero",
    ):
        assert message in quoted("message")
        assert pattern(message).search(told), told


def test_hosts_ranks_and_images_are_refused_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in which two lines are this host, a launcher with other ranks, a folder without images."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for message, make in {
        "…, of which … is this host (…)": lambda: hosts_from(str(tmp_path / "hosts"), None),
        "…, and a launcher has started … ranks": lambda: join(2, None),
        "no file that ends in …": lambda: find_images([tmp_path]),
    }.items():
        assert message in quoted("message")
        assert pattern(message).search(told := given(make, UserError)), told

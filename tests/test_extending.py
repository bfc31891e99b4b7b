"""The page on extending tells the truth: its examples, applied as they stand, are red half done and work whole."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import ROOT, environment

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
HEADER = re.compile(r"# (?P<file>[\w./]+), (?:a new file|(?P<where>above|below|at the end of) `(?P<anchor>.+)`)")
COPIED = ("MLproject", "Makefile", "README.md", "conda.yaml", "pyproject.toml", "analysis", "experiments", "tests")
HALF_DONE: tuple[dict[str, str], ...] = (
    {
        "MLproject": "",
        "Makefile": "",
        "trainer/data/augment.py": '"shear": shear',
        "tests/fixtures/existing/configs/base.yaml": "",
        "tests/analysis/test_checks.py": "",
        "trainer/names.py": "SUPERVISED_SHARE: Metric",
    },
    {"tests/trainer/data/test_augment.py": ""},
)
"""What is still missing: file -> how the piece begins."""


@dataclass(frozen=True)
class Piece:
    """What a block says: a text, and where in which file it goes."""

    file: str
    where: str
    """above, below, at the end of; empty for a new file."""
    anchor: str
    """Beginning of exactly one line of the file."""
    text: str

    def apply(self, root: Path) -> None:
        """Write it into a copy of the project."""
        path = root / self.file
        if not self.where:
            assert not path.exists()
            path.write_text(self.text, encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (at,) = (n for n, line in enumerate(lines) if line.lstrip().startswith(self.anchor.lstrip()))
        if self.where == "at the end of":
            lines[at] = lines[at].rstrip("\n") + self.text
        elif self.where == "below":
            lines.insert(at + 1, self.text)
        else:
            before_next = "\n\n" if self.file.endswith(".py") else "\n"
            lines.insert(at, self.text + before_next)
        path.write_text("".join(lines), encoding="utf-8")


def pieces() -> list[Piece]:
    """Of all examples of the page, in order."""
    found: list[tuple[re.Match[str], list[str]]] = []
    inside = False
    for line in PAGE.splitlines():
        code = line.startswith("    ") or not line
        if match := HEADER.fullmatch(line.strip()) if code else None:
            found.append((match, []))
            inside = True
        elif not code:
            inside = False
        elif inside:
            found[-1][1].append(line.removeprefix("    "))
    return [
        Piece(m["file"], m["where"] or "", m["anchor"] or "", "\n".join(lines).strip("\n") + "\n") for m, lines in found
    ]


def named_tests() -> list[str]:
    """Those that the page says are red."""
    return re.findall(r"^\| `(tests/[\w/]+\.py::\w+)` \|", PAGE, re.MULTILINE)


def copy_with(those: Iterable[Piece], root: Path) -> Path:
    """A copy of the project with some pieces applied."""
    root.mkdir(exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    shutil.copytree(ROOT / "trainer", root / "trainer", ignore=shutil.ignore_patterns("__pycache__", "pocket_base"))
    for name in ("trainer/pocket_base", "benchmarks", "docs"):  # nobody changes them
        (root / name).symlink_to(ROOT / name)
    for piece in those:
        piece.apply(root)
    return root


def in_copy(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python command in a copy, on the copy's modules."""
    of_copy = environment(f"sqlite:///{root}/mlflow.db", PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=of_copy, capture_output=True, text=True, timeout=900
    )


def red(root: Path, tests: Iterable[str]) -> set[str]:
    """Those of some tests that fail in a copy."""
    done = in_copy(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *tests)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "passed" in done.stdout or "failed" in done.stdout
    return set(re.findall(r"^FAILED (tests/[\w/]+\.py::\w+)", done.stdout, re.MULTILINE))


def commands(start: str) -> list[str]:
    """The arguments of the page's one command that begins so, as a shell would split it."""
    (line,) = (line for line in PAGE.replace("\\\n", " ").splitlines() if line.strip().startswith(start))
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All examples applied."""
    return copy_with(pieces(), tmp_path_factory.mktemp("whole"))


def test_the_page_holds_four_examples_in_pieces() -> None:
    """A header that is spelt otherwise would silently leave a piece out."""
    assert len(pieces()) == sum(", a new file" in line or "`" in line for line in _headers()) >= 14
    assert {piece.file.split("/")[0] for piece in pieces()} >= {"experiments", "MLproject", "trainer", "analysis"}


def _headers() -> list[str]:
    return [line for line in PAGE.splitlines() if re.match(r"    # [\w/]+(\.\w+)?, ", line)]


@pytest.mark.slow
def test_every_test_that_the_page_names_is_red_half_done(tmp_path: Path) -> None:
    """In one half or the other: what is missing is noticed."""
    found: set[str] = set()
    for number, missing in enumerate(HALF_DONE):
        there = [p for p in pieces() if not p.text.lstrip().startswith(missing.get(p.file, "(all there)"))]
        assert len(there) == len(pieces()) - len(missing)
        found |= red(copy_with(there, tmp_path / str(number)), named_tests())
    assert found == set(named_tests())


def test_every_test_that_the_page_names_is_green_when_all_is_there(whole: Path) -> None:
    """And so are those beside them that read what was added."""
    experiments, augment = "tests/test_experiments.py", "tests/trainer/data/test_augment.py"
    beside = [
        f"{experiments}::test_the_header_says_question_command_time_and_result[last12_lora]",
        f"{experiments}::test_a_strategy_file_repeats_nothing_of_base[last12_lora]",
        f"{experiments}::test_every_strategy_resolves_on_pocket[last12_lora]",
        f"{augment}::test_every_label_is_sound_and_inside_the_image",
        "tests/trainer/test_metrics.py",
        "tests/analysis/test_checks.py",
    ]
    assert red(whole, [*named_tests(), *beside]) == set()


def test_what_the_page_adds_is_formatted_as_the_project_is(whole: Path) -> None:
    """By ruff, with the project's own settings."""
    touched = sorted({piece.file for piece in pieces() if piece.file.endswith(".py")})
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = in_copy(whole, "-m", "ruff", *command, *touched)
        assert done.returncode == 0, done.stdout


def test_the_strategy_is_planned(whole: Path) -> None:
    """By its name, on pocket: blocks 12 to 23 by LoRA."""
    done = in_copy(whole, *commands("python -m trainer plan"))
    assert done.returncode == 0, done.stderr
    assert "last12_lora" in done.stdout and "12|13|14|15|16|17|18|19|20|21|22|23" in done.stdout


def test_the_operation_is_previewed(whole: Path) -> None:
    """The command of the page, on the built-in data; the labels have moved with the pixels."""
    done = in_copy(whole, *commands("python -m trainer preview"))
    assert done.returncode == 0, done.stderr
    assert (whole / "shear.png").read_bytes().startswith(b"\x89PNG")


USES = """
from dataclasses import replace
import numpy as np
from pathlib import Path
from analysis.checks import careful_reading
from analysis.subject import Arm, Subject
from tests.trainer.data.test_augment import box, change, record
from tests.trainer.test_metrics import meter, step
from trainer import names
from trainer.display import Display
from trainer.reporter import Reporter
from trainer.tracker import Tracker

before = record(box(50, 40, 70, 50))
after = change(before, ("shear", {"max_deg": 30}), seed=3)
assert after.objects[0].geometry.kind == "quad" and after.size == before.size, after

arms = [Arm("a", n_seeds=3, eval_loss=0.5, f1=0.4), Arm("b", n_seeds=3, eval_loss=0.6, f1=0.0)]
found = careful_reading(Subject(arms))
assert [(f.check, "F1 is 0 for b" in f.text) for f in found] == [("no_right_answer", True)], found

class Kept(Tracker):
    rows = []
    def metrics(self, row, step): self.rows.append((step, dict(row)))

reporter = Reporter(Kept(), meter(logging_steps=1), Display(10, quiet=True), Path())
reporter(step(1, 2.0))
assert Kept.rows[0][0] == 1 and Kept.rows[0][1]["supervised_share"] == 0.1, Kept.rows
assert names.metric("supervised_share").exact
"""


def test_operation_check_and_metric_do_what_the_page_says(whole: Path) -> None:
    """A sheared box is a quad on the same canvas; the check speaks of one arm; the metric is reported."""
    done = in_copy(whole, "-c", USES)
    assert done.returncode == 0, done.stderr

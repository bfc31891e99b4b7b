"""The commands that the pages tell people to type, and what is said of those that no test runs."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
HISTORY = {"log.md"}
"""Pages that tell what was done once: their commands are records."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").glob("**/*.md") if page.name not in HISTORY and page.name != "report.md"),
]
PROGRAMS = {
    *("analysis", "mlflow", "python", "pytest", "trainer"),
    *("conda", "git", "make", "pip", "source", "uv"),
    *("apt-get", "cat", "cp", "curl", "export", "mkdir", "nvidia-smi", "read", "sudo", "tail", "tar", "umask", "watch"),
    *("createdb", "createuser", "hf", "kubectl", "pg_dump", "sbatch", "srun", "ssh", "torchrun"),
}
"""A block that begins with one of these holds commands."""
_MARK = re.compile(r"<!-- (not run|run by|run): ?(.*?) -->|<!-- run by (.*?) -->")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: relative to the project's root.
        line: of the page, from 1.
        text: as one line, without its comment.
        not_run: why no test runs it; "" where one does.
        run_by: another test file that does; "" where it is `test_documentation.py`.
    """

    page: str
    line: int
    text: str
    not_run: str = ""
    run_by: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell reads it, variables of the environment before it left out."""
        words = shlex.split(self.text, comments=True)
        while len(words) > 1 and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        return words


def commands_of(page: Path) -> list[Command]:
    """All commands of a page, in their order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = str(page.relative_to(ROOT))
    found: list[Command] = []
    at = 0
    while at < len(lines):
        if not lines[at].startswith("    ") or (at and lines[at - 1].strip() and not _MARK.fullmatch(lines[at - 1])):
            at += 1
            continue
        begin = at
        while at < len(lines) and (lines[at].startswith("    ") or (not lines[at].strip() and _goes_on(lines, at))):
            at += 1
        found += _of_block(name, begin, lines[begin:at], lines[begin - 1] if begin else "")
    return found


def _goes_on(lines: list[str], at: int) -> bool:
    """Whether the block continues behind blank lines."""
    rest = (line for line in lines[at:] if line.strip())
    return next(rest, "").startswith("    ")


def _of_block(page: str, begin: int, block: list[str], above: str) -> list[Command]:
    first = re.sub(r"^(?:[A-Z_]+=\S* )+", "", block[0].strip()).split()[0]
    if first not in PROGRAMS:
        return []
    mark = _MARK.fullmatch(above.strip())
    kind, said = (mark.group(1) or "run by", (mark.group(2) or mark.group(3)).strip()) if mark else ("", "")
    not_run, run_by = (said, "") if kind == "not run" else ("", said)
    if mark:  # told of the block as a whole: here documents and loops are no lines of their own
        return [Command(page, begin + 1, block[0].strip(), not_run, run_by)]
    joined, found = "", []
    for number, line in enumerate(block, begin + 1):
        text = joined + line.strip()
        if text.endswith("\\"):
            joined = text[:-1]
            continue
        joined = ""
        if text and not text.startswith("#"):
            found.append(Command(page, number, re.sub(r"  +#.*$", "", text)))
    return found


def as_project_command(words: list[str]) -> list[str]:
    """What `mlflow run . -e ENTRY -P key=value ...` starts: the command of MLproject, filled in as MLflow fills it in.

    A parameter that the entry point does not have is passed on behind it as `--key value`.
    """
    entries: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    entry, given = "main", {}
    rest = words[2:]
    while rest:
        word = rest.pop(0)
        if word in ("-e", "--entry-point"):
            entry = rest.pop(0)
        elif word == "-P":
            key, _, value = rest.pop(0).partition("=")
            given[key] = value
        elif word in ("--env-manager", "--experiment-name", "--run-name"):
            rest.pop(0)
        else:
            assert word == ".", f"an option of mlflow run that this does not know: {word}"
    point = entries[entry]
    parameters = {name: str(of.get("default", "")) for name, of in point["parameters"].items()}
    filled = [
        word if not (field := _field(word)) else given.get(field, parameters[field])
        for word in point["command"].split()
    ]
    more = [part for key, value in given.items() if key not in parameters for part in (f"--{key}", value)]
    return [*filled, *more]


def _field(word: str) -> str | None:
    return next((field for _, field, _, _ in Formatter().parse(word) if field), None)

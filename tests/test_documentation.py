"""The pages tell the truth: every command that they give is run here as it stands, or says why it is not.

A folder is made as a user's: records, images, a trained arm in a store, a champion. What trains is made short, and what
would train many runs only says what it would do: that these train is what `test_run`, `test_compare` and
`test_mlproject` show.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from analysis.__main__ import cli as analysis_cli
from tests.documented import PAGES, ROOT, Command, as_project_command, commands_of
from tests.running import SMALL, environment, flags, trained, without_mlflow_variables
from tests.server_process import ServerProcess, free_port, started
from trainer.__main__ import cli as trainer_cli
from trainer.data.records import read_records

COMMANDS = [command for page in PAGES if page.exists() for command in commands_of(page)]
TO_RUN = list({command.text: command for command in COMMANDS if not command.not_run and not command.run_by}.values())
SHORT = {
    "run": flags(SMALL | {"training.max_steps": "6", "global_max_length": "1408"}),  # three stages of two
    "compare": ["--dry_run", "true"],
    "sweep": ["--dry_run", "true"],
    "promote": ["--anyway"],  # of arms that were trained for two steps none is told apart
    "predict": ["--max_new_tokens", "8"],
    "import_tensorboard": [],
}
"""What is added to a command, by its name."""
SWIFT = {
    "messages": [
        {"role": "user", "content": "<image>Find the <ref-object>."},
        {"role": "assistant", "content": "<bbox>"},
    ],
    "images": ["img/0.png"],
    "objects": {"ref": ["car"], "bbox": [[2, 2, 9, 9]]},
}
"""A line of ms-swift's grounding data."""
WRITTEN = ("--out", "--to")
"""Options that name what a command writes, and some refuse to write over."""


def coco(photo: Path) -> dict[str, object]:
    """A detection file with one image."""
    with Image.open(photo) as image:
        width, height = image.size
    return {
        "images": [{"id": 1, "file_name": photo.name, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}],
    }


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the pages take for granted; the current one while this lasts."""
    folder, done = tmp_path_factory.mktemp("workshop"), trained()
    for name in ("experiments", "tests", "docs", "benchmarks", "MLproject", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(done.folder / "output", folder / "output")
    shutil.copy(done.store.removeprefix("sqlite:///"), folder / "mlflow.db")
    records = read_records(done.val_jsonl).records[:8]
    for place in ("photos", "coco/val2017", "coco/annotations", "data/img"):
        (folder / place).mkdir(parents=True)
    lines = []
    for number, record in enumerate(records):
        name = f"{number}.png"
        for place in ("photos", "coco/val2017", "data/img"):
            shutil.copy(record.images[0].path, folder / place / name)
        width, height = record.images[0].size
        objects = [{each.geometry.kind: list(each.geometry.points), "desc": each.desc} for each in record.objects]
        lines.append({"images": [f"img/{name}"], "width": width, "height": height, "objects": objects})
    for name, part in (("train", lines[:6]), ("val", lines[6:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    (folder / "coco/annotations/instances_val2017.json").write_text(json.dumps(coco(folder / "coco/val2017/0.png")))
    (folder / "data" / "swift.jsonl").write_text(json.dumps(SWIFT) + "\n")
    with without_mlflow_variables(), pytest.MonkeyPatch.context() as patch:
        for name, value in environment(None).items():
            patch.setenv(name, value)
        patch.chdir(folder)
        assert invoke(["analysis", "promote", "--anyway"]).exit_code == 0
        yield folder


def invoke(words: list[str]) -> Result:
    """A command of ours in this process, which forgets the store that the command before has told MLflow of."""
    mlflow.set_tracking_uri(None)
    cli = analysis_cli if words[0] == "analysis" else trainer_cli
    return CliRunner().invoke(cli, words[1:], standalone_mode=False)


def ours(command: Command) -> list[str] | None:
    """Package, command and arguments; None for a command of another program."""
    words = command.words
    if words[:2] == ["mlflow", "run"]:
        words = as_project_command(words)
    if words[:2] == ["python", "-m"] and words[2] in ("trainer", "analysis"):
        words = words[2:]
    return words if words[0] in ("trainer", "analysis") else None


def test_there_are_commands() -> None:
    """On the README and on the pages beside it."""
    assert len(TO_RUN) > 20
    assert {command.page for command in COMMANDS} >= {"README.md", "docs/use.md", "docs/sweeps.md"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.run_by], ids=lambda c: f"{c.page}:{c.line}")
def test_what_another_test_runs_is_named_there(command: Command) -> None:
    """The test file is there and speaks of the page."""
    assert Path(command.page).name in (ROOT / command.run_by).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.not_run], ids=lambda c: f"{c.page}:{c.line}")
def test_what_is_not_run_says_why(command: Command) -> None:
    """In more than a word."""
    assert len(command.not_run.split()) >= 2


def trains(command: Command) -> bool:
    """Whether it trains a run here, which takes a process and twenty seconds."""
    return (ours(command) or [])[:2] == ["trainer", "run"]


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] * trains(c)) for c in TO_RUN if ours(c)],
    ids=lambda c: f"{c.page}:{c.line}",
)
def test_a_command_of_the_project_does_what_the_page_says(workshop: Path, command: Command) -> None:
    """It ends with status 0; what trains is slow."""
    words = [each for word in ours(command) or [] for each in sorted(glob.glob(word)) or [word]]
    for option in WRITTEN:
        if option in words and (name := words[words.index(option) + 1]):
            target = workshop / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if "--max_steps" in words:  # what is added has a number of its own
        del words[(at := words.index("--max_steps")) : at + 2]
    if "--help" not in words:
        words += SHORT.get(words[1], [])
    if words[:2] == ["trainer", "run"]:  # ends the process that it trains in
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    result = invoke(words)
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"


@pytest.mark.parametrize("command", [c for c in TO_RUN if not ours(c)], ids=lambda c: f"{c.page}:{c.line}")
def test_a_command_of_another_program_is_one_that_it_has(workshop: Path, command: Command) -> None:
    """`make` knows the target, a page of MLflow opens, a script is there with its options, a test file exists."""
    words = command.words
    if words[:2] == ["mlflow", "ui"]:
        port = free_port()
        started_by = [sys.executable, "-m", *words, "--port", str(port)]
        with started(ServerProcess(started_by, workshop, port, dict(os.environ))) as server:
            assert b"MLflow" in urllib.request.urlopen(server.uri, timeout=60).read()
    elif words[0] == "mlflow" or words[:2] == ["python", "-c"]:
        words = [sys.executable, *(["-m", "mlflow"] if words[0] == "mlflow" else []), *words[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python" and (words[1].startswith("benchmarks/") or words[1:2] == ["-m"]):
        script = Path(words[1]) if words[1] != "-m" else Path(words[2].replace(".", "/") + ".py")
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), script
    elif words[0] in ("pytest",):
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
    else:
        raise AssertionError(f"no test knows how to run {command.text!r}; mark it: <!-- not run: why -->")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    """Pages, pictures, and headings inside pages."""
    text = re.sub(r"^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s:]+)\)", text):
        file, _, heading = target.partition("#")
        path = (page.parent / file) if file else page
        assert os.path.exists(path), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target

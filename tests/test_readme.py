"""The README tells the truth: the tree names every module with its job, its files exist, its commands are the ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = ARCHITECTURE.split("## What is inside\n")[1].split("Read the code")[0]


@pytest.mark.parametrize("package", ["trainer", "analysis"])
def test_the_tree_names_every_module_with_the_job_that_its_docstring_states(package: str) -> None:
    """The text beside a file is the beginning of the module's first line."""
    part = re.split(r"\n    \w+/", TREE.split(f"\n    {package}/\n")[1])[0]
    told = dict(re.findall(r"^ +(\w+\.py) +(\S.*)$", part, re.MULTILINE))
    modules = [path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]
    assert set(told) == {path.name for path in modules}
    for path in modules:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert docstring.startswith(told[path.name]), path


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_what_the_readme_links_to_is_there(target: str) -> None:
    """Pictures and documents."""
    assert (ROOT / target).is_file()


def commands(start: str) -> list[str]:
    """The README's command lines that begin with `start`, continuation lines joined, comments taken off."""
    joined = README.replace("\\\n", " ")
    lines = [line.strip().split("  #")[0].strip() for line in joined.splitlines() if line.startswith("    ")]
    return [re.sub(r" +", " ", line) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("command", [c for c in commands("python -m trainer plan") if "Qwen/" not in c])
def test_the_readmes_plans_are_printed(command: str) -> None:
    """Those that need no download; the one for a real Qwen3-VL is checked below."""
    arguments = command.split()[1:]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    assert "optimizer steps" in done.stdout


def test_the_plan_for_a_real_model_names_only_keys_that_exist() -> None:
    """Read as it stands: what is refused is the missing data file, not a key."""
    (command,) = [c for c in commands("python -m trainer plan") if "Qwen/" in c]
    done = subprocess.run([sys.executable, *command.split()[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "data/train.jsonl" in done.stderr
    assert "no such key" not in done.stderr and "unknown" not in done.stderr


def test_every_mlflow_command_names_an_entry_point_and_parameters_that_exist() -> None:
    """`mlflow run` itself is run by test_mlproject."""
    project = (ROOT / "MLproject").read_text(encoding="utf-8")
    found = commands("mlflow run")
    assert len(found) >= 4
    for command in found:
        entry = re.search(r" -e (\w+)", command)
        assert entry and re.search(rf"^  {entry.group(1)}:", project, re.MULTILINE), command


def test_the_make_targets_exist() -> None:
    """`make -n` knows each."""
    targets = set(re.findall(r"(?:^    |`)make ([a-z][\w-]*)", README, re.MULTILINE))
    assert {"last6_lora", "test", "help", "ui"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)

"""docs/architecture.md tells the truth: its tree names every module with the job that its first line states."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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

"""One set of pins: conda.yaml, pyproject.toml, the Makefile and what is installed here say the same."""

import hashlib
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from trainer import names

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PINS: list[str] = PYPROJECT["project"]["dependencies"]
DEV: list[str] = PYPROJECT["dependency-groups"]["dev"]


BUILT = ROOT / "tests" / "golden" / "environment.sha256"
"""Digest of the pins whose environment has been built and run in; `test_environment` writes it."""


def pins_digest() -> str:
    """SHA-256 of what conda.yaml asks for; comments and layout do not count."""
    return hashlib.sha256(json.dumps(CONDA["dependencies"]).encode()).hexdigest()


def variable(name: str) -> str:
    """A variable of the Makefile."""
    (value,) = re.findall(rf"^{name} :?= (.*)$", MAKEFILE, re.MULTILINE)
    return str(value).strip()


def test_conda_yaml_names_the_same_packages_in_the_same_order() -> None:
    """Python 3.11.7, pip, and below it the dependencies of pyproject.toml, character by character."""
    python, pip, packages = CONDA["dependencies"]
    assert (python, pip) == ("python=3.11.7", "pip")
    assert packages == {"pip": PINS}


def test_the_makefile_installs_the_same_torch_first() -> None:
    """The one pin that it repeats."""
    assert variable("TORCH") in PINS
    recipe = MAKEFILE[MAKEFILE.index("$(VENV)/.installed: pyproject.toml") :]
    assert 0 < recipe.index('"$(TORCH)"') < recipe.index("--editable .")


@pytest.mark.parametrize("pin", [*PINS, *DEV])
def test_a_package_is_pinned_exactly_and_installed_so(pin: str) -> None:
    """A local build, such as torch's for CPU, counts as the version it is of."""
    name, version = re.fullmatch(r"([A-Za-z0-9-]+)==([0-9][\w.]*)", pin).groups()
    assert metadata.version(name).partition("+")[0] == version


def test_the_python_of_conda_yaml_is_one_that_the_project_allows() -> None:
    """3.11.7 there, 3.11 or newer here, and what ruff and mypy check against."""
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == "3.11"


def test_the_makefile_has_a_target_for_every_strategy_and_our_experiment() -> None:
    """`make NAME` for each file in experiments/."""
    strategies = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"base"}
    assert set(variable("STRATEGIES").split()) == strategies
    assert variable("EXPERIMENT") == names.EXPERIMENT


def test_the_environment_of_these_pins_has_been_built_and_run_in() -> None:
    """Too slow for every change, so it leaves a digest behind: after a change of pins, `make test-environment`."""
    told = "run `make test-environment` and commit the digest that it writes"
    assert BUILT.read_text(encoding="utf-8").strip() == pins_digest(), told

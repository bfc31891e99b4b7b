"""`pip install .`, as README.md has it: commands `trainer` and `analysis` in any folder, with all that they need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, SMALL, empty_store, environment, flags

SOURCES = ("trainer", "analysis", "experiments", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the project was installed to, from a copy that is gone; what it depends on is that of this environment."""
    source, prefix = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    install += ["--ignore-installed"]  # else pip takes away what this environment itself has, wherever it installs to
    subprocess.run([*install, "--prefix", prefix, source], check=True)
    shutil.rmtree(source)
    return prefix


def call(installed: Path, *words: str, cwd: Path, store: str | None = None) -> subprocess.CompletedProcess[str]:
    """An installed command, from a folder of the user's."""
    (packages,) = installed.glob("lib/python*/site-packages")
    variables = environment(store, PYTHONPATH=str(packages))
    variables["PATH"] = f"{installed / 'bin'}{os.pathsep}{variables['PATH']}"
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_what_runs_is_what_was_installed(installed: Path, tmp_path: Path) -> None:
    """And not a checkout that lies about."""
    code = "import trainer, analysis; print(trainer.__file__, analysis.__file__)"
    done = call(installed, sys.executable, "-c", code, cwd=tmp_path)
    assert all(Path(file).is_relative_to(installed) for file in done.stdout.split()), done.stdout


def test_a_strategy_is_trained_and_ranked_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """Experiment files, the built-in base and the built-in data come along; a sweep and a comparison are planned."""
    store = empty_store(tmp_path)
    trained = call(installed, "trainer", "run", "frozen_vision", *flags(SMALL), cwd=tmp_path, store=store)
    assert trained.returncode == 0, trained.stderr
    ranked = call(installed, "analysis", "rank", "--format", "csv", cwd=tmp_path, store=store)
    assert ranked.returncode == 0 and "frozen_vision" in ranked.stdout, ranked.stderr
    swept = call(installed, "trainer", "sweep", "vit_lr", "--dry_run", "true", cwd=tmp_path, store=store)
    assert swept.returncode == 0 and "0.00015" in swept.stdout, swept.stderr


def test_a_mistake_is_told_as_in_a_checkout(installed: Path, tmp_path: Path) -> None:
    """One message, status 2."""
    done = call(installed, "trainer", "plan", "last6_lorra", cwd=tmp_path)
    assert done.returncode == 2 and "last6_lora" in done.stderr and "Traceback" not in done.stderr

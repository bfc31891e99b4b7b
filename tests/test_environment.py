"""The environment that `mlflow run .` gets from conda.yaml, really built (with uv) and run in; run when pins change."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, environment
from tests.test_pins import BUILT, CONDA, pins_digest

PROJECT_FILES = ("trainer", "analysis", "experiments", "pyproject.toml", "README.md", "LICENSE")


def package_sources() -> list[str]:
    """Where this machine's pip looks beside its index, as flags for uv, which does not read pip's configuration.

    Where a build of torch without CUDA lies in a local folder, pip takes it from there, and so must uv.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, None] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        flag = {"find-links": "--find-links", "extra-index-url": "--extra-index-url"}.get(key.rpartition(".")[2])
        if flag:
            found |= dict.fromkeys(f"{flag}={place}" for place in value.strip("'\"").split())
    return ["--index-strategy=unsafe-best-match", *found]  # all indexes count alike, as they do for pip


@pytest.mark.environment
def test_the_environment_of_conda_yaml_builds_and_plans(tmp_path: Path) -> None:
    """Python as named there, every pin, then our package without dependencies: it plans from a folder of its own."""
    python_version = CONDA["dependencies"][0].partition("=")[2]
    python = tmp_path / "env" / "bin" / "python"
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", python_version, tmp_path / "env"], check=True)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(CONDA["dependencies"][2]["pip"]) + "\n")
    install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, *package_sources(), "-r", requirements], check=True)

    source = tmp_path / "source"  # a copy: a build leaves files beside what it builds
    for name in PROJECT_FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    subprocess.run([*install, "--no-deps", source], check=True)
    shutil.rmtree(source)

    variables = environment(None) | {"PYTHONPATH": ""}
    run = [python, "-m", "trainer", "plan", "last6_lora"]
    done = subprocess.run(run, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here = subprocess.run(
        [sys.executable, "-m", "trainer", "plan", "last6_lora"],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == here.stdout
    where = "import sys, trainer; print(sys.version.split()[0], trainer.__file__)"
    installed = subprocess.run([python, "-c", where], cwd=tmp_path, env=variables, capture_output=True, text=True)
    version, file = installed.stdout.split()
    assert version == python_version and Path(file).is_relative_to(tmp_path / "env")
    BUILT.write_text(pins_digest() + "\n", encoding="utf-8")

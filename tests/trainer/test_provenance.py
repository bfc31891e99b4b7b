"""Fingerprints: the same content gives the same digest, other content another; no foreign commit is named as ours."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from trainer import provenance
from trainer.model import POCKET
from trainer.provenance import base_digest, environment, files_digest, text_digest, version_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with the one file of ours that matters here, committed."""
    folder = tmp_path / "checkout"
    (folder / "trainer").mkdir(parents=True)
    shutil.copy(ROOT / "trainer" / "provenance.py", folder / "trainer")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(folder, *arguments)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, as somebody."""
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_code_version_is_the_commit_and_says_when_files_differ(checkout: Path) -> None:
    """Clean, changed, committed again; untracked files do not count."""
    first = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked.txt").write_text("x")
    assert version_in(checkout) == first
    (checkout / "trainer" / "provenance.py").write_text("changed")
    assert version_in(checkout) == first + "-dirty"
    git(checkout, "commit", "-q", "-a", "-m", "second")
    assert version_in(checkout) == git(checkout, "rev-parse", "HEAD") != first


def test_a_repository_that_merely_lies_around_is_not_named(checkout: Path) -> None:
    """Installed inside somebody's project: their commit says nothing about our code."""
    installed = checkout / ".venv" / "site-packages"
    (installed / "trainer").mkdir(parents=True)
    shutil.copy(ROOT / "trainer" / "provenance.py", installed / "trainer")
    assert version_in(installed) == provenance.metadata.version("vision-tower-experiments")


def test_without_git_the_version_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository, no git at all, and not even installed."""
    version = provenance.metadata.version("vision-tower-experiments")
    assert version_in(tmp_path) == version
    monkeypatch.setenv("PATH", "")
    assert version_in(ROOT) == version

    def missing(name: str) -> str:
        raise provenance.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.metadata, "version", missing)
    assert version_in(tmp_path) == "unknown"


def test_a_digest_follows_content_and_order_not_names(tmp_path: Path) -> None:
    """One changed byte, or two files exchanged, is other data; the same files elsewhere are the same data."""
    (tmp_path / "elsewhere").mkdir()
    a, b, copy = tmp_path / "a", tmp_path / "b", tmp_path / "elsewhere" / "copy of a"
    for path, content in ((a, b"one"), (b, b"two"), (copy, b"one")):
        path.write_bytes(content)
    digest = files_digest([a, b])
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert files_digest([copy, b]) == digest
    assert files_digest([b, a]) != digest
    assert files_digest([a]) != digest
    b.write_bytes(b"twp")
    assert files_digest([a, b]) != digest


def test_the_base_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    """The same for a copy of the folder; another when a byte of the weights differs."""
    shutil.copytree(POCKET, tmp_path / "copy")
    digest = base_digest("pocket", 17)
    assert base_digest(str(tmp_path / "copy"), 99) == digest
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_digest(str(tmp_path / "copy"), 17) != digest


def test_a_random_base_is_told_apart_by_size_and_seed() -> None:
    """There is no file; its weights follow from these two."""
    digests = {base_digest(f"random:{size}", seed) for size in ("2b", "4b") for seed in (17, 18)}
    assert len(digests) == 4
    assert base_digest("random:4b", 17) in digests


def test_a_digest_of_values_does_not_depend_on_the_order_of_keys() -> None:
    """The same mapping written in another order."""
    assert text_digest({"a": 1, "b": [2]}) == text_digest({"b": [2], "a": 1}) != text_digest({"a": 1, "b": [3]})


def test_the_environment_is_json_and_survives_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is left out: DeepSpeed is no package of every machine."""
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = environment()
    assert set(found["packages"]) == {"torch"}
    assert set(json.loads(json.dumps(found))) == {
        "packages", "python", "system", "processors", "torch_threads", "gpus",
    }  # fmt: skip

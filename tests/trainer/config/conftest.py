"""A user's folder to write configuration files in, and the one message a wrong one ends in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from trainer.config.load import load
from trainer.config.resolved import Resolved
from trainer.errors import ConfigError

Write = Callable[..., Path]
Fails = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below an empty current directory and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "their.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def loaded(write: Write) -> Callable[..., Resolved]:
    """Loads a configuration given as text."""

    def load_text(text: str, overrides: Mapping[str, str] | None = None) -> Resolved:
        return load(write(text), overrides=overrides)

    return load_text


@pytest.fixture
def fails(write: Write) -> Fails:
    """Loads a configuration given as text and returns the message it is refused with."""

    def message(text: str, **given: object) -> str:
        with pytest.raises(ConfigError) as caught:
            load(write(text), **given)  # type: ignore[arg-type]  # profile and overrides, as the test says
        told = str(caught.value)
        assert all(part in told for part in ("got:", "allowed:", "do:"))
        assert "pydantic" not in told and "http" not in told
        return told

    return message

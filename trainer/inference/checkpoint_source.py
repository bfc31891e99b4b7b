"""Finds the checkpoint that a command line names: a folder, an MLflow run, or a registered model."""

import re
from pathlib import Path

from trainer.checkpoint import MANIFEST
from trainer.errors import ModelError

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_KINDS = ("best", "last")


def checkpoint_of(source: str) -> Path:
    """The folder of a checkpoint.

    Args:
        source: a checkpoint's folder, that of a run (its best checkpoint, else its last), the id of an MLflow run, or
            `models:/NAME@ALIAS`.

    Raises:
        UserError: there is none.
    """
    folder = Path(source)
    try:
        is_folder = folder.is_dir()
        inside = (folder, *(folder / kind for kind in _KINDS)) if is_folder else ()
        found = next((each for each in inside if (each / MANIFEST).is_file()), None)
    except OSError as error:
        raise _nothing(source, error.strerror or str(error)) from None
    if found:
        return found
    if is_folder:
        raise _nothing(source, f"a folder without {MANIFEST}")
    if source.startswith("models:/") or _RUN_ID.fullmatch(source):
        from trainer.stored import fetched  # MLflow, which takes seconds

        return fetched(source)
    raise _nothing(source, "neither a folder nor a run's id nor models:/NAME@ALIAS")


def _nothing(source: str, got: str) -> ModelError:
    return ModelError(
        source,
        got,
        "a checkpoint's folder (output/RUN/best), an MLflow run's id (32 hex characters), or models:/NAME@ALIAS",
        "python -m analysis rank --each lists runs; python -m analysis promote makes a champion",
    )

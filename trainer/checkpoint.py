"""Writes adapters in PEFT format, whole or not at all, with a manifest of SHA-256; reads them back."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from trainer.events import CheckpointSaved, Seen

MANIFEST = "manifest.json"
_WEIGHTS = "adapter_model.safetensors"


class Saver:
    """Saves one run's checkpoints as `root/KIND` and keeps as many `step-N` as allowed."""

    def __init__(self, model: PeftModel, root: Path, *, keep: int | None, accelerator: Accelerator) -> None:
        """Save `model` below `root`.

        Args:
            model: the PEFT model; only its adapter is written.
            root: the folder; made when first needed.
            keep: checkpoints of training in progress, `best` among them; older `step-N` are removed. None keeps all.
            accelerator: the first rank writes, the others wait for it.
        """
        self._model, self._root, self._keep, self._accelerator = model, root, keep, accelerator
        self._steps: list[Path] = []

    def __call__(self, seen: Seen, kind: str) -> CheckpointSaved:
        """Write the adapter as it is now; an older one of the same kind is replaced."""
        folder = self._root / kind
        if self._accelerator.is_main_process:
            write_adapter(self._model, folder, {"kind": kind, "step": seen.step, "samples_seen": seen.samples})
            self._forget(folder)
        self._accelerator.wait_for_everyone()
        return CheckpointSaved(seen, kind, str(folder), sum(p.stat().st_size for p in folder.iterdir()))

    def _forget(self, newest: Path) -> None:
        """Remove the oldest `step-N` beyond those that are kept."""
        if newest.name.startswith("step-"):
            self._steps.append(newest)
            while self._keep is not None and len(self._steps) > max(1, self._keep - 1):
                shutil.rmtree(self._steps.pop(0))


def write_adapter(model: PeftModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write an adapter aside, sync it, and put it in place of `folder`.

    What stands under the name is never half an adapter; for a moment between two renames it may be absent.
    """
    aside, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(str(aside), save_embedding_layers=False)
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card template, nothing but placeholders
    files = sorted(p for p in aside.iterdir() if p.is_file())
    manifest = {**facts, "files": {p.name: {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in aside.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put a written adapter's tensors into a model that was wrapped by the same plan."""
    loaded: Any = set_peft_model_state_dict(model, load_file(folder / _WEIGHTS))
    missing = [name for name in loaded.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    assert not missing and not loaded.unexpected_keys, (missing, loaded.unexpected_keys)  # noqa: S101  # our own file


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex characters."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""Writes adapters in PEFT format, whole or not at all, with a manifest of SHA-256; reads them back."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer import durable
from trainer.errors import ConfigError
from trainer.events import CheckpointSaved, SaveFailed, Seen

MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WRITING, _OLD = ".writing", ".old"
_MANIFEST_BYTES = 2**26


class BadCheckpoint(ValueError):
    """A checkpoint is not what was written: torn, damaged, or made by somebody else."""


class Saver:
    """Saves one run's checkpoints as `root/KIND` and keeps as many `step-N` as allowed."""

    def __init__(
        self,
        model: PeftModel,
        root: Path,
        *,
        keep: int | None,
        accelerator: Accelerator,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Save `model` below `root`.

        Args:
            model: the PEFT model; only its adapter is written.
            root: the folder; made when first needed.
            keep: checkpoints of training in progress, `best` among them; older `step-N` are removed. None keeps all.
            accelerator: the first rank writes, the others wait for it.
            facts: what every manifest says beside kind and place in training.
        """
        self._facts = facts or {}
        self._model, self._root, self._keep, self._accelerator = model, root, keep, accelerator

    def __call__(self, seen: Seen, kind: str) -> CheckpointSaved | SaveFailed:
        """Write the adapter as it is now; an older one of the same kind is replaced.

        Where there is no room for it, training can go on; but not where it is the last: nothing would be left.

        Raises:
            ConfigError: the last one cannot be written.
        """
        folder = self._root / kind
        facts = {"kind": kind, "step": seen.step, "samples_seen": seen.samples, **self._facts}
        outcome = on_first(self._accelerator, lambda: self._write(folder, facts))
        if isinstance(outcome, int):
            return CheckpointSaved(seen, kind, str(folder), outcome)
        if kind == "last":
            raise no_room(folder, outcome)
        return SaveFailed(seen, kind, outcome)

    def _write(self, folder: Path, facts: Mapping[str, Any]) -> int:
        write_adapter(self._model, folder, facts)
        self._forget()
        return sum(path.stat().st_size for path in folder.iterdir())

    def _forget(self) -> None:
        """Remove the oldest `step-N` beyond those that are kept."""
        if self._keep is not None:
            steps = sorted(self._root.glob("step-*[0-9]"), key=step_of)
            for folder in steps[: -max(1, self._keep - 1)]:
                shutil.rmtree(folder)


def on_first(accelerator: Accelerator, write: Callable[[], int]) -> int | str:
    """What the first rank's `write` returns, or why the disk did not take it, on every rank."""
    outcome: list[int | str] = [0]
    if accelerator.is_main_process:
        try:
            outcome = [write()]
        except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
            of_safetensors = re.search(r"I/O error: (.+) \(os error", str(error))
            outcome = [of_safetensors[1] if of_safetensors else getattr(error, "strerror", None) or str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    return outcome[0]


def no_room(folder: Path, reason: str) -> ConfigError:
    """The message where a run cannot go on without writing."""
    return ConfigError(
        "training.output_dir",
        f"{folder} cannot be written: {reason}",
        "a folder with room for the checkpoints",
        "make room and give the same command again: the run goes on from its last resume point",
    )


def step_of(folder: Path) -> int:
    """The step in a name such as `step-40`; -1 where there is none."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def write_adapter(model: PeftModel, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write an adapter as PEFT does, in place of `folder`.

    Raises:
        OSError, SafetensorError: there is no room; what stands there is untouched.
    """

    def fill(aside: Path) -> None:
        model.save_pretrained(str(aside), save_embedding_layers=False)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's model card template, nothing but placeholders

    write_folder(folder, fill, facts)


def write_folder(folder: Path, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Write files aside with a manifest, sync them, read them back, and put them in place of `folder`.

    What stands under the name is never half of it; for a moment between two renames nothing may (see `mend`).

    Args:
        folder: where it is to stand.
        fill: writes the files into an empty folder.
        facts: what the manifest says beside the digests.

    Raises:
        OSError, SafetensorError: there is no room; what stands there is untouched.
    """
    aside, old = _beside(folder, _WRITING), _beside(folder, _OLD)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        digests = {
            str(path.relative_to(aside)): {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files
        }
        (aside / MANIFEST).write_text(json.dumps({**facts, "files": digests}, indent=1) + "\n", encoding="utf-8")
        for path in (*files, aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
            durable.sync(path)
        verify(aside)
    except BadCheckpoint as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(5, f"what was written does not read back as it was: {error}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    durable.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def mend(root: Path) -> None:
    """Put right what a process left that died while it wrote in a folder of checkpoints."""
    for old in (path for path in root.glob(f"*{_OLD}") if path.is_dir()):
        folder = old.with_name(old.name.removesuffix(_OLD))
        if folder.exists():
            shutil.rmtree(old)
        else:  # it died between the two renames
            old.rename(folder)
    for aside in (path for path in root.glob(f"*{_WRITING}") if path.is_dir()):
        shutil.rmtree(aside)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        BadCheckpoint: they are not, or there is no manifest.
    """
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MANIFEST_BYTES:
            raise BadCheckpoint(f"{MANIFEST} is too large")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = {str(name): (str(facts["sha256"]), int(facts["bytes"])) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{MANIFEST}: {type(error).__name__} {error}") from None
    for name, (sha256, size) in listed.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise BadCheckpoint(f"{MANIFEST} names {name!r}, which is not a file of its folder")
        try:
            if path.stat().st_size != size:
                raise BadCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {size}")
            if file_sha256(path) != sha256:
                raise BadCheckpoint(f"{name} is not what was written: its SHA-256 differs")
        except OSError as error:
            raise BadCheckpoint(f"{name}: {error.strerror}") from None
    return dict(manifest)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put a written adapter's tensors into a model that was wrapped by the same plan."""
    loaded: Any = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    missing = [name for name in loaded.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    assert not missing and not loaded.unexpected_keys, (missing, loaded.unexpected_keys)  # noqa: S101  # our own file


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex characters."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)

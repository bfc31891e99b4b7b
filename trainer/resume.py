"""Resume points: all that an interrupted run needs to go on as if nothing had happened, as safetensors and JSON.

A point holds, by parameter name and whole, whatever the number of ranks, the weights that train and what the optimizer
remembers of them; and as JSON where in the loop training stands, and what metrics, gate and reports go on from. Nothing
that is drawn at random needs to be kept: data order, augmentation and dropout are functions of seed and step.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import MANIFEST, BadCheckpoint, mend, on_first, step_of, verify, write_folder
from trainer.engine import MOMENTS, Engine
from trainer.events import SaveFailed
from trainer.model import TrainedTensor
from trainer.position import Position, position_of

FOLDER = "resume"
_TENSORS, _STATE, _BEST = "tensors.safetensors", "state.json", "best"
_KEPT = 2
_FORMAT = 1


class Stateful(Protocol):
    """A part of a run that remembers something."""

    def state(self) -> dict[str, Any]:
        """All of it, JSON-able."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; raises KeyError, TypeError or ValueError where it is none."""


class Told(Protocol):
    """What a run tells the outside, entry by entry (a `Tracker`)."""

    @property
    def last(self) -> int:
        """Number of the last entry."""

    def sync(self) -> None:
        """Make all of them survive a power cut."""

    def need_from(self, number: int) -> None:
        """Say which entries a resumed training will want to compare."""


@dataclass(frozen=True)
class Point:
    """A resume point on disk that has been found sound."""

    folder: Path
    position: Position
    spool: int
    """Number of the last entry that was told before it."""
    parts: Mapping[str, Mapping[str, Any]]
    """Name -> state of each part of the run that remembers something."""


class Keeper:
    """Writes the resume points of one run, as `root/resume/step-N`, and keeps the newest two."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        parts: Mapping[str, Stateful],
        accelerator: Accelerator,
        *,
        told: Told,
        key: str = "",
    ) -> None:
        """Keep points below `root`.

        Args:
            root: the run's folder, whose `best` checkpoint belongs to each point too.
            engine: of this rank.
            parts: what else remembers something.
            accelerator: the first rank writes.
            told: what the run has told so far, which must be as durable as the point.
            key: of the training, to which the points belong.
        """
        self._root, self._engine, self._parts, self._accelerator = root, engine, parts, accelerator
        self._told, self._key = told, key

    def __call__(self, position: Position) -> SaveFailed | None:
        """Write a point; where there is no room for it, those before stay, and what failed is returned."""
        tensors = dict(self._tensors(position))
        outcome = on_first(self._accelerator, lambda: self._write(position, tensors))
        return None if isinstance(outcome, int) else SaveFailed(position.seen, "resume point", outcome)

    def _tensors(self, position: Position) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments on the first rank; all ranks take part in gathering them."""
        first = self._accelerator.is_main_process
        for tensor in self._engine.trained:
            moments = self._engine.moments(tensor) if position.seen.step else {}
            for name, value in {"weight": self._engine.weight(tensor), **moments}.items():
                if first:
                    yield f"{name}/{tensor.name}", value.detach().cpu().contiguous()

    def _write(self, position: Position, tensors: dict[str, Tensor]) -> int:
        self._told.sync()
        spool = self._told.last
        folder = self._root / FOLDER / f"step-{position.seen.step}"
        state = {"position": asdict(position), "parts": {name: part.state() for name, part in self._parts.items()}}

        def fill(aside: Path) -> None:
            save_file(tensors, aside / _TENSORS)
            (aside / _STATE).write_text(json.dumps(state), encoding="utf-8")
            if (best := self._root / "best").is_dir():
                # What is best now must be there when training goes on from here, although a later one replaces it. A
                # copy, and no link: what damages one of them must not damage all.
                shutil.copytree(best, aside / _BEST)

        write_folder(folder, fill, {"format": _FORMAT, "key": self._key, "step": position.seen.step, "spool": spool})
        points = newest_first(self._root)
        for old in points[_KEPT:]:
            shutil.rmtree(old)
        self._told.need_from(_facts(points[:_KEPT][-1])["spool"] + 1)
        return spool


def newest_first(root: Path) -> list[Path]:
    """The folders of a run's resume points."""
    return sorted((root / FOLDER).glob("step-*[0-9]"), key=step_of, reverse=True)


def read_point(folder: Path, key: str | None = None) -> Point:
    """A resume point, after every byte of it was checked; with a key, one of that training.

    Raises:
        BadCheckpoint: it is damaged, or something else.
    """
    manifest = verify(folder)
    with _told(_STATE):
        if manifest["format"] != _FORMAT:
            raise BadCheckpoint(f"of format {manifest['format']!r}; this version reads {_FORMAT}")
        if key is not None and manifest["key"] != key:
            raise BadCheckpoint("of another training")
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        position = position_of(state["position"])
        if position.seen.step != step_of(folder):
            raise BadCheckpoint(f"it holds step {position.seen.step}")
        return Point(folder, position, int(manifest["spool"]), {str(k): dict(v) for k, v in state["parts"].items()})


def newest_good(root: Path, key: str | None = None) -> tuple[Point | None, list[str]]:
    """The newest sound resume point of a run, None where there is none; and a line for each newer one that is not."""
    mend(root / FOLDER)
    mend(root)
    lines: list[str] = []
    for folder in newest_first(root):
        try:
            return read_point(folder, key), lines
        except BadCheckpoint as error:
            lines.append(f"the resume point {folder} cannot be used ({error}); the one before it is taken")
    return None, lines


def load_weights(point: Point, trained: Sequence[TrainedTensor]) -> None:
    """Put a point's weights into the model, before the engine is made of it.

    Raises:
        BadCheckpoint: they, or what the optimizer remembers, are not those of this model.
    """
    with _opened(point) as stored, torch.no_grad():
        _check(stored, trained, point.position.seen.step)
        for tensor in trained:
            tensor.parameter.copy_(stored.get_tensor(f"weight/{tensor.name}"))


def load_moments(point: Point, engine: Engine) -> None:
    """Give the optimizer its memory back, on all ranks together; only the first reads the point's files."""

    def moment(tensor: TrainedTensor, name: str) -> Tensor:
        own = torch.empty_like(tensor.parameter) if stored is None else stored.get_tensor(f"{name}/{tensor.name}")
        return engine.from_first(own)

    if step := point.position.seen.step:
        with nullcontext() if engine.rank else _opened(point) as stored:
            engine.load_moments(step, moment)


def restore_parts(point: Point, parts: Mapping[str, Stateful]) -> None:
    """Let every part of the run remember what it knew; raises what `Stateful.restore` does."""
    for name, part in parts.items():
        part.restore(point.parts[name])


def restore_best(root: Path, point: Point) -> None:
    """Make `best` the checkpoint that was best at a point, where training has replaced it since."""
    kept, best = point.folder / _BEST, root / "best"
    if not kept.is_dir():
        shutil.rmtree(best, ignore_errors=True)
    elif _manifest(best) != _manifest(kept):
        write_folder(best, lambda aside: _copy_files(kept, aside), _facts(kept))


def forget_newer(root: Path, point: Point | None) -> None:
    """Remove the points after the one that training goes on from: they are of a course that is left, or damaged."""
    for folder in newest_first(root):
        if point is None or step_of(folder) > point.position.seen.step:
            shutil.rmtree(folder)


def forget_points(root: Path) -> None:
    """Remove the resume points of a run that has finished."""
    shutil.rmtree(root / FOLDER, ignore_errors=True)


def _copy_files(source: Path, to: Path) -> None:
    for path in source.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, to / path.name)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return verify(folder)
    except BadCheckpoint:
        return None


def _facts(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {key: value for key, value in manifest.items() if key != "files"}


@contextmanager
def _opened(point: Point) -> Iterator[Any]:
    with _told(_TENSORS), safe_open(point.folder / _TENSORS, framework="pt") as stored:
        yield stored


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever is wrong inside a file becomes one kind of error that names it."""
    try:
        yield
    except BadCheckpoint:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{name}: {type(error).__name__} {error}") from None


def _check(stored: Any, trained: Sequence[TrainedTensor], step: int) -> None:
    """Whether a file holds the tensors of this model and no others.

    Raises:
        BadCheckpoint: it does not.
    """
    kinds = ("weight", *MOMENTS) if step else ("weight",)
    wanted = {f"{kind}/{tensor.name}": list(tensor.parameter.shape) for kind in kinds for tensor in trained}
    if odd := sorted(wanted.keys() ^ set(stored.keys())):
        raise BadCheckpoint(f"{_TENSORS} does not hold the tensors of this model: {len(odd)} differ, such as {odd[0]}")
    for name, shape in wanted.items():
        found = stored.get_slice(name)
        if (found.get_shape(), found.get_dtype()) != (shape, "F32"):
            raise BadCheckpoint(f"{_TENSORS}: {name} is {found.get_dtype()} {found.get_shape()} and not F32 {shape}")

"""One `predict` command: images in, `predictions.jsonl` and pictures out, gone on with where it was interrupted."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.inference.image_files import Found
from trainer.inference.predictor import Prediction, Predictor

PREDICTIONS, PICTURES = "predictions.jsonl", "pictures"
_UNDER_WAY = f"{PREDICTIONS}.part"
_HALF_LETTERS = "backslashreplace"
"""A file's name that is not UTF-8 has them in Python: written so, they are what JSON says for them."""
_LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""


@dataclass
class Summary:
    """What a job has done.

    Attributes:
        images: with an answer.
        earlier: of them, those that an interrupted job before this one had done.
        objects: of all answers.
        states: answers by whether they were sound.
        repairs: what was mended in answers, and how often.
        problems: image -> why it has no answer.
        missing: letters that pictures show as boxes.
        seconds: that captioning took, reading images and drawing included.
    """

    images: int = 0
    earlier: int = 0
    objects: int = 0
    states: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, name: str, line: Mapping[str, Any]) -> None:
        """Count one image."""
        if "error" in line:
            self.problems[name] = line["error"]
            return
        self.images += 1
        self.objects += len(line["objects"])
        self.states[line["answer"]] += 1
        self.repairs.update(line.get("repairs", {}))


class Job:
    """A folder that predictions go to, line by line."""

    def __init__(self, out: Path, found: Found, key: Mapping[str, Any], *, pictures: bool) -> None:
        """Begin, or go on with what an interrupted job of the same key has left.

        Args:
            out: the folder; made when it is not there.
            found: the images.
            key: what predictions depend on; with another one everything is done anew.
            pictures: whether images are drawn too.

        Raises:
            DataError: the folder cannot be written.
        """
        self._out, self._found, self._pictures = out, found, pictures
        self.summary = Summary()
        with _Writable(out):
            (out / PICTURES if pictures else out).mkdir(parents=True, exist_ok=True)
            known = {self.name(path) for path, _ in found.images}
            earlier = _earlier(out / _UNDER_WAY, dict(key))
            self._lines = {name: line for name, line in earlier.items() if name in known and "error" not in line}
            aside = out / f"{_UNDER_WAY}.new"
            self._file = aside.open("w", encoding="utf-8", errors=_HALF_LETTERS)
            self._write(dict(key))
            for name, line in self._lines.items():
                self._write({"images": [name], **line})
                self.summary.add(name, line)
            aside.rename(out / _UNDER_WAY)  # not before: what was done is never in neither of them
        self.summary.earlier = self.summary.images

    def run(self, predictor: Predictor, *, batch_size: int) -> Iterator[int]:
        """Caption what has not been captioned; yields 1 for each image that is done.

        Raises:
            DataError: there is no room for the results; those so far are kept.
        """
        started = time.perf_counter()
        names = [self.name(path) for path, _ in self._found.images]
        todo = [n for n, name in enumerate(names) if name not in self._lines]
        for path, problem in self._found.faults.items():
            self._add(self.name(path), {"error": problem})
        images = [self._found.images[n] for n in todo]
        for index, made in predictor.predict(images, batch_size=batch_size):
            with _Writable(self._out):
                if self._pictures and not made.problem:
                    self._draw(images[index][0], made)
                self._add(names[todo[index]], made.as_json())
            yield 1
        self.summary.seconds = time.perf_counter() - started
        with _Writable(self._out):
            self._finish()

    def close(self) -> None:
        """Let go of the file; what it holds can be gone on with."""
        self._file.close()

    def name(self, path: Path) -> str:
        """An image's name in the results: relative to the folder that was given."""
        return os.path.relpath(path, self._found.root) if self._found.root != Path() else os.fspath(path)

    def picture(self, name: str) -> Path:
        """Where an image's picture goes."""
        *folders, last = ("__" if part == ".." else part for part in name.split("/") if part)
        last = last if last.lower().endswith(".png") else f"{last}.png"
        if len(os.fsencode(last)) > _LONGEST_NAME:
            digest = hashlib.sha256(os.fsencode(last)).hexdigest()[:16]
            last = f"{last[:50]}-{digest}.png"
        return Path(self._out, PICTURES, *folders, last)

    def _draw(self, path: Path, made: Prediction) -> None:
        from trainer.inference.drawn import draw_prediction  # matplotlib, which takes a second

        out = self.picture(self.name(path))
        out.parent.mkdir(parents=True, exist_ok=True)
        self.summary.missing |= set(draw_prediction(path, made, out))

    def _add(self, name: str, line: dict[str, Any]) -> None:
        if name not in self._lines:
            self.summary.add(name, line)
            self._lines[name] = line
            self._write({"images": [name], **line})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def _finish(self) -> None:
        """All lines in the order of the images, in place of what was written on the way."""
        order = [self.name(path) for path in (*(path for path, _ in self._found.images), *self._found.faults)]
        self._file.close()
        aside = self._out / f"{PREDICTIONS}.new"
        lines = (json.dumps({"images": [name], **self._lines[name]}, ensure_ascii=False) for name in order)
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors=_HALF_LETTERS)
        aside.rename(self._out / PREDICTIONS)
        (self._out / _UNDER_WAY).unlink()


def _earlier(path: Path, key: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an interrupted job of the same key has done: name -> line."""
    try:
        first, *rest = path.read_bytes().split(b"\n")
        if json.loads(first) != key:
            return {}
    except (OSError, ValueError):
        return {}
    done = {}
    for text in rest:
        try:
            line = json.loads(text)
        except ValueError:  # the last one, cut, perhaps within a letter
            break
        (name,) = line.pop("images")
        done[name] = line
    return done


class _Writable:
    """What keeps a folder from being written becomes one message."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise DataError(
                "--out",
                f"{self._out}: {error.strerror}",
                "a folder that can be written, with room",
                "choose another place, or make room and give the same command again: it goes on",
            ) from None

"""Captions images with a trained adapter: loads it once, answers in batches, reads the answers into objects."""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from trainer.checkpoint import load_adapter
from trainer.data.geometry import Size
from trainer.data.images import image_sizes
from trainer.data.records import Object, Picture, Record
from trainer.data.template import Sample
from trainer.errors import DataError, ModelError
from trainer.generation import generate
from trainer.inference.recipe import Recipe, recipe_of
from trainer.inference.repair import NOTHING, Reading, read_answer
from trainer.inference.stopping import StopWhenComplete
from trainer.model import load_model, load_tools

_LEAST = 256
"""Tokens that an answer gets where the image alone is longer than a training sample."""
_CHUNK = 8
"""Batches that are sorted at once, to put prompts of like length together; pixels are read a batch at a time."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        size: (width, height) of the image in pixels.
        text: its answer, as generated.
        reading: the objects of it, in pixels.
        problem: why there is no answer; empty where there is one.
    """

    size: Size
    text: str = ""
    reading: Reading = NOTHING
    problem: str = ""

    @property
    def objects(self) -> tuple[Object, ...]:
        """In pixels of the image, in the order of the answer."""
        return self.reading.objects

    def as_json(self) -> dict[str, Any]:
        """As a line of JSONL, but for the image's name; objects as in training records, pixels to a tenth."""
        if self.problem:
            return {"error": self.problem}
        objects = [
            {o.geometry.kind: [round(value, 1) for value in o.geometry.points], "desc": o.desc} for o in self.objects
        ]
        width, height = self.size
        made = {"width": width, "height": height, "objects": objects, "answer": self.reading.state}
        return {**made, "repairs": dict(self.reading.repairs)} if self.reading.repairs else made


class Predictor:
    """A base model with an adapter, ready to caption."""

    def __init__(self, model: Any, recipe: Recipe, *, max_new_tokens: int | None = None) -> None:
        """Take a loaded model.

        Args:
            model: a (PEFT-wrapped) `Qwen3VLForConditionalGeneration`, on its device.
            recipe: how its adapter was trained.
            max_new_tokens: of an answer; None: what a training sample had room for beside the prompt.
        """
        self._model, self.recipe = model, recipe
        self._encoder = recipe.encoder(load_tools(recipe.base_model))
        self._max_new_tokens = max_new_tokens

    def predict(self, images: Sequence[tuple[Path, Size]], *, batch_size: int) -> Iterator[tuple[int, Prediction]]:
        """Caption images; those of like size are answered together.

        Args:
            images: (path, (width, height) in pixels), as `image_sizes` gives them.
            batch_size: images a forward pass.

        Yields:
            (index of the image, what is said of it), in the order in which they are done.
        """
        for start in range(0, len(images), batch_size * _CHUNK):
            pixels: dict[int, int] = {}
            for index in range(start, min(start + batch_size * _CHUNK, len(images))):
                if problem := self._encoder.image_problem(_record(*images[index])):
                    yield index, Prediction(images[index][1], problem=problem.removeprefix(": "))
                else:
                    pixels[index] = math.prod(self._shown(*images[index]))
            by_length = sorted(pixels, key=lambda index: pixels[index])  # prompts differ in their images alone
            for first in range(0, len(by_length), batch_size):
                prompts: list[tuple[int, Sample]] = []
                for index in by_length[first : first + batch_size]:
                    made = self._prompt(*images[index])
                    if isinstance(made, str):
                        yield index, Prediction(images[index][1], problem=made)
                    else:
                        prompts.append((index, made))
                if prompts:
                    yield from self._answered(prompts, images)

    def predict_bytes(self, files: Sequence[bytes], *, batch_size: int) -> list[Prediction]:
        """Caption images that were sent, in their order; what is no image gets a problem."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(index) for index in range(len(files))]
            for path, data in zip(paths, files, strict=True):
                path.write_bytes(data)
            sizes = image_sizes(paths)
            in_order = [(path, sizes[path]) for path in paths]
            found = [Prediction((0, 0), problem=size if isinstance(size, str) else "") for _, size in in_order]
            sound = [(n, path, size) for n, (path, size) in enumerate(in_order) if not isinstance(size, str)]
            for index, made in self.predict([(path, size) for _, path, size in sound], batch_size=batch_size):
                found[sound[index][0]] = made
        return found

    def _shown(self, path: Path, size: Size) -> Size:
        """An image's size as the model is shown it."""
        (shown,) = self._encoder.shown_sizes(_record(path, size))
        return shown

    def _prompt(self, path: Path, size: Size) -> Sample | str:
        """The prompt for an image, or why there is none."""
        try:
            return self._encoder.prompt(_record(path, size))
        except DataError as error:
            return error.got

    def _answered(
        self, prompts: Sequence[tuple[int, Sample]], images: Sequence[tuple[Path, Size]]
    ) -> Iterator[tuple[int, Prediction]]:
        tokenizer = self._encoder.tokenizer
        longest = max(len(sample.input_ids) for _, sample in prompts)
        answers = generate(
            self._model,
            self._encoder,
            [sample for _, sample in prompts],
            batch_size=len(prompts),
            max_new_tokens=self._max_new_tokens or max(_LEAST, self.recipe.max_length - longest),
            stop=lambda: StopWhenComplete(tokenizer),
        )
        for (index, _), text in zip(prompts, answers, strict=True):
            path, size = images[index]
            reading = read_answer(text, size, self.recipe.emit_norm, self._shown(path, size))
            yield index, Prediction(size, text, reading)


def _record(path: Path, size: Size) -> Record:
    return Record(path.name, (Picture(path, *size),), ())


def load_predictor(
    folder: Path, *, base: str = "", device: str = "auto", max_new_tokens: int | None = None
) -> Predictor:
    """Load a checkpoint with the base model that it was trained on.

    Args:
        folder: as a run has written it.
        base: where that base is now; empty: where it was.
        device: `cpu`, `cuda`, `cuda:1`; `auto`: a GPU where there is one.
        max_new_tokens: see `Predictor`.

    Raises:
        ModelError: checkpoint, base or device cannot be used.
    """
    recipe = recipe_of(folder).on(base)
    return Predictor(load_trained(folder, recipe, device=device), recipe, max_new_tokens=max_new_tokens)


def load_trained(folder: Path, recipe: Recipe, *, device: str = "auto") -> Any:
    """Base and adapter on a device; of a folder that holds a merged model, that one.

    Raises:
        ModelError: base or device cannot be used.
    """
    place = _device(device)
    tools = load_tools(recipe.base_model)
    base = load_model(recipe.base_model, tools, dtype=recipe.dtype, attn_impl="auto", seed=recipe.seed)
    if recipe.merged:
        return base.to(place).eval()  # type: ignore[arg-type]  # transformers' own wrapper of `to`
    loaded: PeftModel = PeftModel.from_pretrained(base, os.fspath(folder))
    # PEFT makes full copies of a bf16 base bf16; they were trained, and are stored, in float32
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data = parameter.data.float()
    load_adapter(loaded, folder)
    return loaded.to(place).eval()


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(asked)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"--device {asked}",
            str(error).splitlines()[0],
            "auto, cpu, or a GPU that is here: cuda, cuda:1",
            "leave it out to take what is there",
        ) from None
    return found

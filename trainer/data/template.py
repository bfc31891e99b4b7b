"""A record as the model meets it: chat template, token ids, image patches, positions, and what is supervised."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from trainer.data.answer import ParsedObject, answer_text, parse_answer
from trainer.data.geometry import EmitNorm, Size
from trainer.data.images import read_image
from trainer.data.prompts import Language, Scheme, Taxonomy, system_prompt, user_prompt
from trainer.data.records import TASKS, Picture, Record, Task
from trainer.errors import DataError, ModelError

__all__ = ["Encoder", "ParsedObject", "Sample", "TokenCounts", "answer_text", "mrope_positions", "parse_answer"]

# Shapes: L tokens of a sample, n images of a sample, P patches of all its images, merge**2 patches a token.

Truncation = Literal["raise", "right"]

IMAGE_TOKEN, END_TOKEN = "<|image_pad|>", "<|im_end|>"

# No limit of our own: far above any image, and still exact as a float inside the processor's arithmetic.
_UNLIMITED_PIXELS = 2**50


@dataclass(frozen=True)
class Sample:
    """One encoded record.

    Attributes:
        record_id: `file:line`.
        input_ids: (L,) int64.
        supervised: (L,) bool; the tokens that carry loss. All False for a prompt.
        image_tokens: (L,) bool; the places that image features fill.
        position_ids: (3, L) int64; M-RoPE positions: time, height, width.
        pixel_values: (P, channels * temporal patch * patch * patch) float32.
        image_grid_thw: (n, 3) int64; patches in time, height, width.
        domain: of the record.
    """

    record_id: str
    input_ids: Tensor
    supervised: Tensor
    image_tokens: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    domain: str | None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of a sample: the words of its prompt with all chat tokens, its images, its answer with its end mark."""

    prompt: int
    image: int
    answer: int

    @property
    def whole(self) -> int:
        """All of them."""
        return self.prompt + self.image + self.answer


def mrope_positions(image_tokens: Tensor, image_grid_thw: Tensor, merge_size: int) -> Tensor:
    """Positions in time, height and width as Qwen3-VL counts them.

    Text advances all three by one a token. An image's tokens share one time, spread over its merged grid in
    height and width, and the text behind it goes on after the longer of its two sides.

    Args:
        image_tokens: (L,) bool.
        image_grid_thw: (n, 3) patches; n is the number of runs of True above, times are 1.
        merge_size: patches a side that make one token.

    Returns:
        (3, L) int64.
    """
    pieces: list[Tensor] = []
    grids = iter((image_grid_thw[:, 1:] // merge_size).tolist())
    start = 0
    runs, lengths = torch.unique_consecutive(image_tokens, return_counts=True)
    for is_image, length in zip(runs.tolist(), lengths.tolist(), strict=True):
        if is_image:
            height, width = next(grids)
            index = torch.arange(length)
            pieces.append(start + torch.stack([torch.zeros_like(index), index // width, index % width]))
            start += max(height, width)
        else:
            pieces.append((start + torch.arange(length)).expand(3, -1))
            start += length
    return torch.cat(pieces, dim=1)


class Encoder:
    """Turns records into samples for one model, one wording and one frame of coordinates."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        scheme: Scheme,
        language: Language,
        emit_norm: EmitNorm,
        taxonomy: Taxonomy | None,
        max_length: int,
        truncation: Truncation,
        max_pixels: int | None,
    ) -> None:
        """Keep the parts and look once at the chat template.

        Args:
            tokenizer: with a Qwen3-VL chat template.
            image_processor: its patch and merge sizes, mean and standard deviation are used, its size limits are not.
            scheme: of the system prompt.
            language: of the prompts.
            emit_norm: frame of the coordinates.
            taxonomy: quoted by scheme B.
            max_length: tokens of a sample.
            truncation: what happens to a longer one: `right` cuts the answer, `raise` is an error.
            max_pixels: images above are scaled down to it; None never scales, beyond rounding the sides to
                multiples of patch x merge.

        Raises:
            ModelError: the tokenizer has no chat template, or one whose answer does not follow the prompt directly.
        """
        self.emit_norm, self.max_length, self.truncation = emit_norm, max_length, truncation
        ids = [_token_id(tokenizer, token) for token in (IMAGE_TOKEN, END_TOKEN, tokenizer.pad_token or END_TOKEN)]
        self._image_id, self._end_id, self.pad_id = ids
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._language = language
        self._system = {task: system_prompt(scheme, language, emit_norm, taxonomy, task) for task in TASKS}
        self._max_pixels = max_pixels or _UNLIMITED_PIXELS
        self._merge = int(image_processor.merge_size)
        self._factor = int(image_processor.patch_size) * self._merge
        self._prompts: dict[tuple[int, Task], list[int]] = {}
        self._latest: tuple[str, list[int]] = ("", [])
        self._check_template()

    def token_counts(self, record: Record) -> TokenCounts:
        """Tokens of the record's sample before anything is cut, without looking at its pixels."""
        words, image = self._prompt_parts(record)
        return TokenCounts(words, image, len(self._answer_ids(record)))

    def opening(self, records: Iterable[Record]) -> int:
        """Words with which the prompts of all these records begin, before the first image."""
        kinds = {(len(record.images), record.task): record for record in records}
        starts = [takewhile(lambda token: token != self._image_id, self._prompt_ids(r)) for r in kinds.values()]
        return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*starts, strict=False)))

    def length(self, record: Record) -> int:
        """Tokens of the record's sample, without looking at its pixels; above `max_length` it cannot be encoded."""
        prompt = self._prompt_length(record)
        whole = prompt + len(self._answer_ids(record))
        return whole if self.truncation == "raise" or prompt >= self.max_length else min(whole, self.max_length)

    def problem(self, record: Record) -> str | None:
        """Say why a record cannot be encoded (image too thin, too long), or None; pixels are not looked at."""
        if found := self.image_problem(record):
            return found
        prompt = self._prompt_length(record)
        if prompt >= self.max_length:
            return f": prompt and image alone take {prompt} tokens of {self.max_length}"
        if (length := self.length(record)) > self.max_length:
            return f": {length} tokens, more than {self.max_length}"
        return None

    def fits(self, record: Record) -> bool:
        """Whether a record can be encoded with nothing of its answer cut."""
        if self.problem(record):
            return False
        return self.truncation == "raise" or self.token_counts(record).whole <= self.max_length

    def image_problem(self, record: Record) -> str | None:
        """Say which image is too thin for the model, or None; a record with one has no tokens to be counted."""
        for width, height in (picture.size for picture in record.images):
            long, short = max(width, height), min(width, height)
            if 2 * short <= self._factor or long > 200 * short:
                return (
                    f": image of {width}x{height} pixels is too thin "
                    f"(sides above {self._factor // 2} pixels, at most 200 times as long as wide)"
                )
        return None

    def encode(self, record: Record) -> Sample:
        """Encode prompt and answer; answer and its end mark are supervised.

        Raises:
            DataError: the record cannot be encoded, see `problem`, or its image has gone since it was checked.
        """
        if found := self.problem(record):
            raise DataError(
                where=record.id,
                got=found.removeprefix(": "),
                allowed=f"at most {self.max_length} tokens (`global_max_length`)",
                do="raise the limit, set `template.truncation_strategy: right`, or leave the record out",
            )
        return self._sample(record, self._answer_ids(record))

    def prompt(self, record: Record) -> Sample:
        """Encode the prompt alone, up to where the answer begins: for generation. Nothing is supervised."""
        return self._sample(record, [])

    def shown_sizes(self, record: Record) -> list[Size]:
        """(width, height) in pixels of each of the record's images as the model is shown them."""
        return [self._shown(*picture.size) for picture in record.images]

    def answer(self, record: Record) -> str:
        """The answer text of a record, in this encoder's frame."""
        return answer_text(record, self.emit_norm, self.shown_sizes(record))

    def kept_answer(self, record: Record) -> str:
        """What of the answer's text fits `max_length` beside the prompt."""
        room = max(0, self.max_length - self._prompt_length(record))
        return str(self.tokenizer.decode(self._answer_ids(record)[:room], skip_special_tokens=True))

    def messages(self, record: Record) -> list[dict[str, Any]]:
        """System and user message of a record, in the form that chat templates take."""
        return self._messages(len(record.images), record.task)

    def conversation(self, record: Record) -> str:
        """The whole conversation of a record as the chat template writes it, to look at: one image token an image."""
        answer = {"role": "assistant", "content": self.answer(record)}
        return self._render([*self.messages(record), answer])

    def _shown(self, width: int, height: int) -> Size:
        rows, columns = smart_resize(
            height, width, self._factor, min_pixels=self._factor**2, max_pixels=self._max_pixels
        )
        return columns, rows

    def _messages(self, n_images: int, task: Task) -> list[dict[str, Any]]:
        images: list[dict[str, str]] = [{"type": "image"}] * n_images
        request = {"type": "text", "text": user_prompt(self._language, n_images, task)}
        return [{"role": "system", "content": self._system[task]}, {"role": "user", "content": [*images, request]}]

    def _check_template(self) -> None:
        try:
            prompt = self._render(self._messages(1, "dense"), add_generation_prompt=True)
            whole = self._render([*self._messages(1, "dense"), {"role": "assistant", "content": "{}"}])
        except Exception as error:  # jinja and the tokenizer raise many types here
            raise self._template_error(f"a chat template that fails: {error}") from error
        if prompt.count(IMAGE_TOKEN) != 1 or not whole.startswith(f"{prompt}{{}}{END_TOKEN}"):
            raise self._template_error(f"a chat template that renders {whole[-200:]!r}")

    def _template_error(self, got: str) -> ModelError:
        return ModelError(
            where=f"tokenizer {self.tokenizer.name_or_path}",
            got=got,
            allowed=f"Qwen3-VL's: one {IMAGE_TOKEN} an image, the answer right after the prompt, then {END_TOKEN}",
            do="use the tokenizer and chat template of a Qwen3-VL Instruct model",
        )

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    def _prompt_ids(self, record: Record) -> list[int]:
        """Token ids of the prompt with one image token an image; made once for each number of images and each task."""
        key = (len(record.images), record.task)
        if key not in self._prompts:
            text = self._render(self._messages(*key), add_generation_prompt=True)
            self._prompts[key] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._prompts[key]

    def _prompt_length(self, record: Record) -> int:
        return sum(self._prompt_parts(record))

    def _prompt_parts(self, record: Record) -> tuple[int, int]:
        """Tokens of the prompt's words, and of its images."""
        pixels = sum(width * height for width, height in self.shown_sizes(record))
        return len(self._prompt_ids(record)) - len(record.images), pixels // self._factor**2

    def _answer_ids(self, record: Record) -> list[int]:
        text = self.answer(record)
        if text != self._latest[0]:  # checking, measuring and encoding a record ask for the same ids in turn
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._latest = (text, [*ids, self._end_id])
        return self._latest[1]

    def _sample(self, record: Record, answer: list[int]) -> Sample:
        pixel_values, grid = self._pixels(record)
        per_image = iter((grid.prod(dim=1) // self._merge**2).tolist())
        ids: list[int] = []
        for token in self._prompt_ids(record):
            ids += [token] * (next(per_image) if token == self._image_id else 1)
        n_prompt = len(ids)
        input_ids = torch.tensor((ids + answer)[: max(n_prompt, self.max_length)])  # (L,)
        image_tokens = input_ids == self._image_id
        return Sample(
            record_id=record.id,
            input_ids=input_ids,
            supervised=torch.arange(len(input_ids)) >= n_prompt,
            image_tokens=image_tokens,
            position_ids=mrope_positions(image_tokens, grid, self._merge),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            domain=record.domain,
        )

    def _pixels(self, record: Record) -> tuple[Tensor, Tensor]:
        """Patches (P, patch numbers) float32 and grid (n, 3) of a record's images."""
        images = [_drawn(picture) for picture in record.images]
        limits = {"shortest_edge": self._factor**2, "longest_edge": self._max_pixels}
        features = self.image_processor(images=images, size=limits, return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]


def _drawn(picture: Picture) -> Image.Image:
    image = read_image(picture.path)
    return image if picture.warp is None else Image.fromarray(picture.warp.render(np.asarray(image)))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    # A token that is not there may come back as the one for unknown text.
    if not isinstance(found, int) or tokenizer.convert_ids_to_tokens(found) != token:
        raise ModelError(
            where=f"tokenizer {tokenizer.name_or_path}",
            got=f"no token {token}",
            allowed="the tokenizer of a Qwen3-VL model",
            do="correct `model.model`",
        )
    return found

"""Ends a generated answer where it is complete or goes in circles, token by token, without waiting for an end mark."""

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

_REPEATS = 3
"""Times that an answer may give one and the same object before it counts as going in circles."""


class AnswerWatch:
    """Follows the JSON of one answer as it grows."""

    def __init__(self) -> None:
        """Before the first letter."""
        self.ended = False
        """Whether the outermost brace is closed, or the answer repeats itself."""
        self._depth, self._in_text, self._escaped = 0, False, False
        self._object, self._seen = "", Counter[str]()

    def read(self, piece: str) -> None:
        """Take in what was generated next."""
        for letter in piece:
            self._object += letter
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_text = True
            elif letter == "{":
                self._depth, self._object = self._depth + 1, letter
            elif letter == "}":
                self._close()

    def _close(self) -> None:
        self._depth -= 1
        self._seen[self._object] += 1
        self.ended = self.ended or self._depth <= 0 or self._seen[self._object] >= _REPEATS
        self._object = ""


class StopWhenComplete(StoppingCriteria):
    """Ends each answer of a batch by itself; `generate` takes a new one for each batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Stop answers of one tokenizer.

        Args:
            tokenizer: a byte-level one, in whose tokens ASCII letters stand for themselves.
        """
        self._watches: list[AnswerWatch] = []

        @cache
        def piece(token: int) -> str:
            return str(tokenizer.convert_ids_to_tokens(token))

        self._piece = piece

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which answers have ended.

        Args:
            input_ids: (B, L) prompts and what was generated so far; asked after every token.
            scores: (B, vocabulary); not looked at.

        Returns:
            (B,) bool.
        """
        if not self._watches:
            self._watches = [AnswerWatch() for _ in range(len(input_ids))]
        for watch, token in zip(self._watches, input_ids[:, -1].tolist(), strict=True):
            if not watch.ended:
                watch.read(self._piece(token))
        return torch.tensor([watch.ended for watch in self._watches], device=input_ids.device)

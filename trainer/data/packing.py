"""Lays samples into packs of bounded length, and packs into the micro-batches of every rank; seeded, nothing lost.

A pack is a list of sample indices. Without packing every pack holds one sample, so that all below is written once.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise, repeat
from typing import Protocol

import numpy as np

Pack = list[int]

WINDOW = 1024
"""Samples of the shuffled order that are packed together: enough for full packs, and an order that stays random."""


def epoch_order(n: int, *, seed: int, epoch: int, purpose: str = "data-order") -> list[int]:
    """The order of n things in an epoch (from 0); depends on nothing but these four values."""
    generator = np.random.default_rng([seed, epoch, *purpose.encode()])
    return [int(index) for index in generator.permutation(n)]


def best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int, *, window: int = WINDOW) -> list[Pack]:
    """Pack samples best-fit, window by window of an order: each goes into the fullest pack that has room for it.

    Samples are taken as the order has them. Taking the longest first would fill packs a little better, and would put
    samples of equal length together: measured on pocket, that made every arm's eval loss worse (docs/log.md). The
    emptiest pack of a window is taken up again in the next one.

    Args:
        lengths: tokens of each sample, none above `capacity`.
        order: indices into `lengths`, each at most once.
        capacity: tokens of a pack.
        window: samples packed together.

    Returns:
        Packs that hold every index of `order` once; in each, the samples are in the order they were put there.
    """
    packs: list[Pack] = []
    carried: Pack = []
    for start in range(0, len(order), window):
        filled = _fill(lengths, [*carried, *order[start : start + window]], capacity)
        last = start + window >= len(order)
        carried = [] if last else filled.pop()[1]
        packs += [pack for _, pack in filled]
    return packs


def _fill(lengths: Sequence[int], samples: Sequence[int], capacity: int) -> list[tuple[int, Pack]]:
    """(room left, pack) of every pack, the fullest first."""
    filled: list[tuple[int, Pack]] = []  # sorted by room, so that the first with enough room is the fullest
    for index in samples:
        place = bisect_left(filled, lengths[index], key=lambda pair: pair[0])
        room, pack = filled.pop(place) if place < len(filled) else (capacity, [])
        insort(filled, (room - lengths[index], [*pack, index]), key=lambda pair: pair[0])
    return filled


class Samples(Protocol):
    """What there is to be packed, epoch by epoch: augmentation and turns of several records change it."""

    @property
    def is_constant(self) -> bool:
        """Whether every epoch holds the same."""

    def count(self, epoch: int) -> int:
        """Samples of an epoch (from 0)."""

    def lengths(self, epoch: int) -> tuple[int, ...]:
        """Tokens of each of them."""


@dataclass(frozen=True)
class Fixed:
    """The same samples in every epoch."""

    tokens: tuple[int, ...]
    """Of each sample."""
    is_constant = True

    def count(self, epoch: int) -> int:
        """Samples of an epoch."""
        return len(self.tokens)

    def lengths(self, epoch: int) -> tuple[int, ...]:
        """Tokens of each of them."""
        return self.tokens


@dataclass(frozen=True)
class StepPlan:
    """Which samples every rank runs in every micro-batch of every optimizer step: a pure function of its fields."""

    samples: Samples
    seed: int
    micro_batch: int
    """Packs that one rank runs forward at once."""
    accumulation: int
    """Micro-batches of each rank in one optimizer step, at most."""
    ranks: int = 1
    capacity: int | None = None
    """Tokens of a pack; None: every sample is a pack of its own."""

    def packs(self, epoch: int) -> tuple[Pack, ...]:
        """The packs of an epoch in the order in which they are trained on; every sample is in exactly one."""
        if self.capacity is None:
            return tuple([index] for index in epoch_order(self.samples.count(epoch), seed=self.seed, epoch=epoch))
        return _packs(self.samples.lengths(epoch), self.seed, epoch, self.capacity)

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.packs(epoch)) / (self.micro_batch * self.accumulation * self.ranks))

    def last_steps(self, epochs: float) -> list[int]:
        """The step that ends each epoch, counted from 1; a fraction ends inside its epoch.

        Where samples change from epoch to epoch, all epochs count as long as the first: to measure them all before
        training would take minutes. The last one then ends a little before or after its last pack.
        """
        whole, steps = math.floor(epochs), 0
        ends = []
        for epoch in range(whole):
            steps += self._expected_steps(epoch)
            ends.append(steps)
        # rounded up, but not for the last bit of a float product: 0.07 * 100 is 7, not 8
        part = max(1, math.ceil(round((epochs - whole) * self._expected_steps(whole), 9))) if epochs > whole else 0
        return [*ends, steps + part] if part else ends

    def _expected_steps(self, epoch: int) -> int:
        return self.steps_in_epoch(epoch if self.samples.is_constant else 0)

    def steps(self, first_step: int = 0) -> Iterator[list[list[Pack]]]:
        """The micro-batches of one step after the other, each as one list of samples a rank; endless.

        The packs of an epoch go evenly over its steps, which differ by one pack at most: a short last step would move
        the weights as far as a full one, on less. Ranks share the packs of a step micro-batch by micro-batch. Where its
        last packs do not reach all of them, the rest get an empty list: they must run something of no weight, since the
        others wait for them.

        Args:
            first_step: how many steps to leave out at the start.

        Yields:
            micro-batches -> ranks -> sample indices, the packs of a rank's micro-batch end to end.
        """
        epoch, first_step = self._place(first_step)
        while True:
            at_once = self.micro_batch * self.ranks
            n_steps = self.steps_in_epoch(epoch)  # none where weights below 1 draw no sample
            for packs in _evenly(self.packs(epoch), n_steps)[first_step:] if n_steps else ():
                micro_batches = [packs[start : start + at_once] for start in range(0, len(packs), at_once)]
                # evenly again, so that no rank waits for another that has two packs more
                yield [[list(chain(*of_rank)) for of_rank in _evenly(some, self.ranks)] for some in micro_batches]
            epoch, first_step = epoch + 1, 0

    def epochs(self, first_step: int = 0) -> Iterator[int]:
        """The epoch (from 0) of each step, as `steps` goes; endless."""
        epoch, first_step = self._place(first_step)
        while True:
            yield from repeat(epoch, self.steps_in_epoch(epoch) - first_step)
            epoch, first_step = epoch + 1, 0

    def _place(self, steps_before: int) -> tuple[int, int]:
        """The epoch that a step lies in, and how many of the epoch's steps come before it."""
        epoch = 0
        while steps_before >= (count := self.steps_in_epoch(epoch)):
            steps_before -= count
            epoch += 1
        return epoch, steps_before


def _evenly(packs: Sequence[Pack], parts: int) -> list[Sequence[Pack]]:
    """Cut into so many parts in order; the first may hold one pack more than the last."""
    each, more = divmod(len(packs), parts)
    starts = [part * each + min(part, more) for part in range(parts + 1)]
    return [packs[start:end] for start, end in pairwise(starts)]


@lru_cache(maxsize=4)  # the plan, the loader and the counts of a run ask for the same epochs
def _packs(lengths: tuple[int, ...], seed: int, epoch: int, capacity: int) -> tuple[Pack, ...]:
    packs = best_fit(lengths, epoch_order(len(lengths), seed=seed, epoch=epoch), capacity)
    return tuple(packs[i] for i in epoch_order(len(packs), seed=seed, epoch=epoch, purpose="pack-order"))

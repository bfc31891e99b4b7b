"""Samples in batches: a seeded order that can be entered at any step, micro-batches, batches of an evaluation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.data.records import OnBadRecord, Record, RecordSet, bad_records_error
from trainer.data.template import Encoder, Sample

# Shapes: B samples of a batch, L tokens of its longest sample, P patches and n images of the whole batch.


@dataclass(frozen=True)
class Batch:
    """Samples that one rank runs forward at once, padded on the right.

    Attributes:
        record_ids: of the B samples.
        domains: of the B samples.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64; 0 where padded.
        supervised: (B, L) bool.
        position_ids: (4, B, L) int64; place in the text, then M-RoPE's time, height, width. 0 where padded.
        pixel_values: (P, numbers of a patch) float32.
        image_grid_thw: (n, 3) int64.
    """

    record_ids: tuple[str, ...]
    domains: tuple[str | None, ...]
    input_ids: Tensor
    attention_mask: Tensor
    supervised: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor

    @property
    def n_samples(self) -> int:
        """B."""
        return len(self.record_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def n_supervised(self) -> int:
        """Tokens with loss."""
        return int(self.supervised.sum())

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of `Qwen3VLForConditionalGeneration.forward`."""
        names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        tensors = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return Batch(record_ids=self.record_ids, domains=self.domains, **tensors)


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Put samples in one batch, padded on the right to the longest.

    Args:
        samples: at least one.
        pad_id: token id of the padding.

    Returns:
        The batch, samples in the given order.
    """
    pad = partial(pad_sequence, batch_first=True)
    positions = [torch.cat([torch.arange(len(s.input_ids))[None], s.position_ids]) for s in samples]  # each (4, L)
    return Batch(
        record_ids=tuple(s.record_id for s in samples),
        domains=tuple(s.domain for s in samples),
        input_ids=pad([s.input_ids for s in samples], padding_value=pad_id),
        attention_mask=pad([torch.ones_like(s.input_ids) for s in samples]),
        supervised=pad([s.supervised for s in samples]),
        position_ids=pad([p.T for p in positions]).permute(2, 0, 1).contiguous(),
        pixel_values=torch.cat([s.pixel_values for s in samples]),
        image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
    )


class SampleSet(Dataset[Sample]):
    """Records as samples, encoded when first asked for and kept in memory up to a bound."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, *, cache_bytes: int = 2**30) -> None:
        """Nothing is encoded yet.

        Args:
            records: all of them must pass `check_lengths`.
            encoder: turns them into samples.
            cache_bytes: memory for encoded samples, shared among loader processes; what does not fit is encoded anew.
        """
        self.records = tuple(records)
        self.encoder = encoder
        self._cache: dict[int, Sample] = {}
        self._free_bytes = cache_bytes

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one record.

        Raises:
            DataError: it cannot be encoded.
            OSError: its image has gone.
        """
        if index in self._cache:
            return self._cache[index]
        sample = self.encoder.encode(self.records[index])
        size = sum(value.nbytes for value in vars(sample).values() if isinstance(value, Tensor))
        worker = get_worker_info()
        # First come, first kept: epochs visit everything once, so that replacing old samples would never hit.
        if size * (worker.num_workers if worker else 1) <= self._free_bytes:
            self._free_bytes -= size * (worker.num_workers if worker else 1)
            self._cache[index] = sample
        return sample

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sample, without looking at pixels."""
        return tuple(self.encoder.length(record) for record in self.records)


def check_lengths(record_set: RecordSet, encoder: Encoder, *, on_bad_record: OnBadRecord = "error") -> RecordSet:
    """Look for records that cannot be encoded: too long, or an image too thin for a single token.

    Args:
        record_set: records that are sound in themselves.
        encoder: of the run.
        on_bad_record: `error` reports all of them at once, `skip` leaves them out.

    Returns:
        The records that can be encoded, with one message more for each that was left out.

    Raises:
        DataError: naming them all, or none is left.
    """
    problems = {record.id: problem for record in record_set.records if (problem := encoder.problem(record))}
    messages = [f"{name}{problem}" for name, problem in problems.items()]
    if problems and (on_bad_record == "error" or len(problems) == len(record_set.records)):
        raise bad_records_error(
            record_set.path, messages, n_bad=len(problems), n_records=len(record_set.records) + len(record_set.skipped)
        )
    kept = tuple(record for record in record_set.records if record.id not in problems)
    return RecordSet(record_set.path, kept, (*record_set.skipped, *messages))


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """The order of n samples in an epoch (from 0); depends on nothing but these three numbers."""
    generator = np.random.default_rng([seed, epoch, *b"data-order"])
    return [int(index) for index in generator.permutation(n)]


def steps_per_epoch(n: int, micro_batch: int, accumulation: int) -> int:
    """Optimizer steps of an epoch of n samples; the last one may be short."""
    return math.ceil(n / (micro_batch * accumulation))


def step_indices(
    n: int, *, seed: int, micro_batch: int, accumulation: int, first_step: int = 0
) -> Iterator[list[list[int]]]:
    """Which samples each optimizer step holds, micro-batch by micro-batch; endless.

    Args:
        n: samples of an epoch.
        seed: of the order.
        micro_batch: samples of a micro-batch.
        accumulation: micro-batches of a step; the last step of an epoch takes what is left.
        first_step: how many steps to leave out at the start.

    Yields:
        Index lists into the samples.
    """
    samples_a_step = micro_batch * accumulation
    epoch, step = divmod(first_step, steps_per_epoch(n, micro_batch, accumulation))
    while True:
        order = epoch_order(n, seed=seed, epoch=epoch)
        for start in range(step * samples_a_step, n, samples_a_step):
            yield _chunks(order[start : start + samples_a_step], micro_batch)
        epoch, step = epoch + 1, 0


def train_steps(
    samples: SampleSet, *, seed: int, micro_batch: int, accumulation: int, workers: int = 0, first_step: int = 0
) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step after the other; endless, see `step_indices`.

    Args:
        samples: at least one.
        seed: of the order; the same seed gives the same batches whatever else differs.
        micro_batch: samples of a micro-batch.
        accumulation: micro-batches of a step.
        workers: loader processes; 0 encodes in this one.
        first_step: how many steps to leave out at the start; their images are not opened.

    Yields:
        One to `accumulation` batches.
    """
    plan = partial(
        step_indices, len(samples), seed=seed, micro_batch=micro_batch, accumulation=accumulation, first_step=first_step
    )
    batches = _batches(samples, (indices for step in plan() for indices in step), workers)
    for step in plan():
        yield list(islice(batches, len(step)))


def eval_batches(samples: SampleSet, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every sample once, short ones first, so that little is padded.

    Args:
        samples: what to evaluate.
        batch_size: samples of a batch; the last one may be smaller.
        workers: loader processes; 0 encodes in this one.

    Yields:
        Batches, always the same ones.
    """
    by_length = sorted(range(len(samples)), key=samples.lengths.__getitem__)
    yield from _batches(samples, iter(_chunks(by_length, batch_size)), workers)


def _batches(samples: SampleSet, plan: Iterator[list[int]], workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        samples,
        batch_sampler=plan,
        collate_fn=partial(collate, pad_id=samples.encoder.pad_id),
        num_workers=workers,
        generator=torch.Generator(),  # without its own it would draw from, and so shift, torch's global stream
    )
    return iter(loader)


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]

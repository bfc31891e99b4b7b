"""Samples in batches: padded rows or one packed row, the micro-batches of a step, the batches of an evaluation."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.data.packing import StepPlan, best_fit
from trainer.data.records import OnBadRecord, Record, RecordSet, bad_records_error
from trainer.data.template import Encoder, Sample
from trainer.data.turns import EACH, Mix, Turn, possible, shown, turns
from trainer.errors import DataError

# Shapes: L tokens of a row, P patches and n images of the whole batch. Padded: B rows, one a sample, L the longest of
# them. Packed: B is 1, and L all samples end to end (the packs of a micro-batch too: one row needs no padding at all).


@dataclass(frozen=True)
class Batch:
    """Samples that one rank runs forward at once.

    Attributes:
        record_ids: of the samples, in the order in which they stand in the rows.
        domains: of the samples.
        token_counts: of the samples, padding not counted.
        supervised_counts: tokens with loss of the samples.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 0 where padded. None where packed: transformers looks for packs in the positions
            only where there is no mask.
        supervised: (B, L) bool.
        position_ids: (4, B, L) int64; place in the text, then M-RoPE's time, height, width. 0 where padded; where
            packed, a place of 0 begins the next sample.
        pixel_values: (P, numbers of a patch) float32.
        image_grid_thw: (n, 3) int64.
    """

    record_ids: tuple[str, ...]
    domains: tuple[str | None, ...]
    token_counts: tuple[int, ...]
    supervised_counts: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor | None
    supervised: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor

    @property
    def n_samples(self) -> int:
        """Samples that count."""
        return len(self.record_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens of the samples, without padding."""
        return sum(self.token_counts)

    @property
    def n_supervised(self) -> int:
        """Tokens with loss."""
        return sum(self.supervised_counts)

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of `Qwen3VLForConditionalGeneration.forward`."""
        names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)

    def per_record(self, losses: Tensor) -> tuple[Tensor, ...]:
        """(supervised tokens of the batch,) row by row -> the piece of each sample."""
        return torch.split(losses, list(self.supervised_counts))

    def silent(self) -> "Batch":
        """The same forward pass without any weight: nothing is supervised, and no sample is counted.

        A rank that has no pack left runs it, so that it takes part in the exchange of gradients; its own are zero.
        """
        nothing: dict[str, Any] = dict.fromkeys(("record_ids", "domains", "token_counts", "supervised_counts"), ())
        return replace(self, **nothing, supervised=torch.zeros_like(self.supervised))


def collate(samples: Sequence[Sample], pad_id: int, *, packed: bool = False) -> Batch:
    """Put samples in one batch: a row each, padded on the right to the longest, or all end to end in one row.

    Args:
        samples: at least one.
        pad_id: token id of the padding.
        packed: whether they share one row.

    Returns:
        The batch, samples in the given order.
    """
    positions = [torch.cat([torch.arange(len(s.input_ids))[None], s.position_ids]).T for s in samples]  # each (L, 4)

    def rows(values: Sequence[Tensor], padding: int = 0) -> Tensor:
        return torch.cat(list(values))[None] if packed else pad_sequence(list(values), True, padding)

    return Batch(
        record_ids=tuple(s.record_id for s in samples),
        domains=tuple(s.domain for s in samples),
        token_counts=tuple(len(s.input_ids) for s in samples),
        supervised_counts=tuple(int(s.supervised.sum()) for s in samples),
        input_ids=rows([s.input_ids for s in samples], pad_id),
        attention_mask=None if packed else rows([torch.ones_like(s.input_ids) for s in samples]),
        supervised=rows([s.supervised for s in samples]),
        position_ids=rows(positions).permute(2, 0, 1).contiguous(),
        pixel_values=torch.cat([s.pixel_values for s in samples]),
        image_grid_thw=torch.cat([s.image_grid_thw for s in samples]),
    )


Draw = tuple[int, int]
"""Which sample: (epoch, its place among the samples of that epoch), both from 0."""


Watch = Callable[[Sequence[int]], Iterable[int]]


class SampleCache:
    """Encoded samples by what they are made of, kept up to a bound; several sets share one."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        """Empty. `max_bytes` of memory for tensors, shared among loader processes."""
        self._samples: dict[Record, Sample] = {}
        self._free_bytes = max_bytes

    def get(self, record: Record, encode: Callable[[Record], Sample]) -> Sample:
        """The sample of a record, encoded where nothing equal was before; what does not fit is encoded anew."""
        content = replace(record, id="", weight=1.0)
        if content in self._samples:
            return replace(self._samples[content], record_id=record.id)
        sample = encode(record)
        size = sum(value.nbytes for value in vars(sample).values() if isinstance(value, Tensor))
        worker = get_worker_info()
        size *= worker.num_workers if worker else 1
        # First come, first kept: epochs visit everything once, so that replacing old samples would never hit.
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._samples[content] = sample
        return sample


class SampleSet(Dataset[Sample]):
    """Records as the samples of each epoch, encoded when they are asked for."""

    def __init__(
        self, records: Sequence[Record], encoder: Encoder, mix: Mix = EACH, *, cache: SampleCache | None = None
    ) -> None:
        """Nothing is encoded yet.

        Args:
            records: all of them must pass `check_lengths`.
            encoder: turns them into samples.
            mix: how they are put together and changed.
            cache: of samples that are not augmented; None: one of its own.
        """
        self.records = tuple(records)
        self.encoder = encoder
        self.mix = mix
        self.cache = cache or SampleCache()
        self._lengths: dict[int, tuple[int, ...]] = {}
        self._turns: tuple[int, list[Turn]] = (-1, [])

    def count(self, epoch: int) -> int:
        """Samples of an epoch."""
        return len(self.turns(epoch))

    def lengths(self, epoch: int, watch: Watch = iter) -> tuple[int, ...]:
        """Tokens of each sample of an epoch, without looking at pixels.

        Args:
            epoch: from 0.
            watch: passes on the places of the samples while they are measured, to whoever shows progress.
        """
        if self.is_constant:
            return self.own_lengths
        if epoch not in self._lengths:
            places = watch(range(self.count(epoch)))
            self._lengths[epoch] = tuple(self.encoder.length(self.record((epoch, place))) for place in places)
        return self._lengths[epoch]

    @cached_property
    def own_lengths(self) -> tuple[int, ...]:
        """Tokens of every record as it is in the file, as a sample of its own; of the longer of its two tasks."""
        ratio = self.mix.summary_ratio
        return tuple(max(map(self.encoder.length, possible(record, ratio))) for record in self.records)

    @cached_property
    def is_constant(self) -> bool:
        """Whether every epoch holds the same samples."""
        weights = self.mix.seed is not None and any(record.weight != 1 for record in self.records)
        return self.mix.is_plain and self.mix.chain is None and not weights

    def turns(self, epoch: int) -> list[Turn]:
        """Which records make each sample of an epoch."""
        if self._turns[0] != epoch:
            alone = self.mix.images_per_turn == 1
            lengths = () if alone else self.own_lengths
            made = turns(self.records, lengths, self.mix, epoch=epoch, max_length=self.encoder.max_length)
            self._turns = (epoch, made)
        return self._turns[1]

    def record(self, draw: Draw) -> Record:
        """What a sample is made of."""
        epoch, place = draw
        return self.shown(self.turns(epoch)[place], epoch)

    def shown(self, turn: Turn, epoch: int) -> Record:
        """A turn as an epoch shows it. Where augmentation would make it too long or too thin, it is left as it is."""
        record = shown(turn, self.records, self.mix, epoch=epoch)
        if self.mix.chain is not None and not self.encoder.fits(record):
            return shown(turn, self.records, self.mix, epoch=epoch, changed=False)
        return record

    def __getitem__(self, draw: Draw) -> Sample:
        """One sample.

        Raises:
            DataError: it cannot be encoded, or its image has gone.
        """
        record = self.record(draw)
        if any(picture.warp is not None for picture in record.images):
            return self.encoder.encode(record)
        return self.cache.get(record, self.encoder.encode)


def check_lengths(
    record_set: RecordSet, encoder: Encoder, *, on_bad_record: OnBadRecord = "error", summary_ratio: float = 0.0
) -> RecordSet:
    """Look for records that cannot be encoded: too long, or an image too thin for a single token.

    Args:
        record_set: records that are sound in themselves.
        encoder: of the run.
        on_bad_record: `error` reports all of them at once, `skip` leaves them out.
        summary_ratio: of the run; where both tasks can be drawn, both must fit.

    Returns:
        The records that can be encoded, with one message more for each that was left out.

    Raises:
        DataError: naming them all, or none is left.
    """
    tasks = [each for record in record_set.records for each in possible(record, summary_ratio)]
    problems = {record.id: problem for record in tasks if (problem := encoder.problem(record))}
    messages = [f"{name}{problem}" for name, problem in problems.items()]
    if problems and (on_bad_record == "error" or len(problems) == len(record_set.records)):
        raise bad_records_error(
            record_set.path, messages, n_bad=len(problems), n_records=len(record_set.records) + len(record_set.skipped)
        )
    kept = tuple(record for record in record_set.records if record.id not in problems)
    return RecordSet(record_set.path, kept, (*record_set.skipped, *messages))


def train_steps(
    samples: SampleSet, plan: StepPlan, *, rank: int = 0, workers: int = 0, first_step: int = 0
) -> Iterator[list[Batch]]:
    """One rank's micro-batches of one optimizer step after the other; endless.

    Args:
        samples: the plan's own.
        plan: which samples each step holds; packs are laid end to end where it has a capacity.
        rank: whose micro-batches.
        workers: loader processes; 0 encodes in this one.
        first_step: how many steps to leave out at the start; their images are not opened.

    Yields:
        One to `accumulation` batches; a silent one where the rank has no pack left.
    """

    @cache
    def shortest() -> Draw:
        lengths = plan.samples.lengths(0)  # where nothing is packed nobody else asks for them, and it takes its time
        return 0, lengths.index(min(lengths))

    def steps() -> Iterator[list[list[Draw]]]:
        for epoch, micro_batches in zip(plan.epochs(first_step), plan.steps(first_step), strict=True):
            yield [[(epoch, place) for place in ranks[rank]] for ranks in micro_batches]

    flat = (draws or [shortest()] for step in steps() for draws in step)
    batches = _batches(samples, flat, workers, packed=plan.capacity is not None)
    for step in steps():
        pairs = zip(step, islice(batches, len(step)), strict=True)
        yield [batch if draws else batch.silent() for draws, batch in pairs]


def eval_batches(
    samples: SampleSet,
    *,
    batch_size: int,
    capacity: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Every sample once over all ranks, in packs or short ones first, so that little is padded.

    Args:
        samples: what to evaluate.
        batch_size: packs (samples, unpacked) of a batch; the last one may be smaller.
        capacity: tokens of a pack; None: no packs.
        rank: whose share of the batches.
        ranks: how many share them.

    Yields:
        Batches, always the same ones.
    """
    lengths = samples.lengths(0)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest_first = by_length[::-1]  # fills packs best, and in an evaluation nothing depends on who shares one
    packs = [[i] for i in by_length] if capacity is None else best_fit(lengths, longest_first, capacity)
    batches = [
        [(0, place) for pack in packs[start : start + batch_size] for place in pack]
        for start in range(0, len(packs), batch_size)
    ]
    yield from _batches(samples, iter(batches[rank::ranks]), 0, packed=capacity is not None)


def _batches(samples: SampleSet, plan: Iterator[list[Draw]], workers: int, *, packed: bool) -> Iterator[Batch]:
    loader = DataLoader(
        _Careful(samples),
        batch_sampler=plan,
        collate_fn=partial(_collated, pad_id=samples.encoder.pad_id, packed=packed),
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # without its own it would draw from, and so shift, torch's global stream
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _leave_signals_to_the_trainer(_: int) -> None:
    """A signal to the whole group is the trainer's to fulfil; it ends its workers, and they end when it has died."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Careful(Dataset[Sample | DataError]):
    """Hands a user's mistake on like a sample: raised in a loader process, it would lose its type and its words."""

    def __init__(self, samples: SampleSet) -> None:
        self._samples = samples

    def __getitem__(self, draw: Draw) -> Sample | DataError:
        try:
            return self._samples[draw]
        except DataError as error:
            return error


def _collated(items: Sequence[Sample | DataError], pad_id: int, *, packed: bool) -> Batch | DataError:
    samples = []
    for item in items:
        if isinstance(item, DataError):
            return item
        samples.append(item)
    return collate(samples, pad_id, packed=packed)

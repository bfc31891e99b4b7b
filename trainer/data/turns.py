"""What the samples of an epoch are: which records share a turn, how often each comes, with which task, changed how."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.data.augment import Chain
from trainer.data.packing import epoch_order
from trainer.data.records import Record, Task
from trainer.seeds import derived_seed


@dataclass(frozen=True, slots=True)
class Showing:
    """One record in a turn."""

    record: int
    """Its place in the file's good records."""
    copy: int = 0
    """Which showing of it in this epoch; above 0 only where its weight is above 1."""
    task: Task = "dense"


Turn = tuple[Showing, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """How records become samples. The same mix, epoch and records always give the same samples."""

    images_per_turn: int = 1
    """Images in one user turn at most; a line with more has a turn of its own."""
    summary_ratio: float = 0.0
    """Share of the records that have a summary whose answer is the summary."""
    seed: int | None = None
    """Of training: the order in which records meet in a turn, repeats by weight, tasks. None: an evaluation, always the
    same: turns in the order of the file and of one domain each, weights of no effect, tasks by the id of the record."""
    chain: Chain | None = None
    """Augmentation; None: records as they are."""

    @property
    def is_plain(self) -> bool:
        """Whether every record is a turn of its own (where weights are 1), whatever the epoch."""
        return self.images_per_turn == 1 and not self.summary_ratio


EACH = Mix()
"""Every record once, as it is, a turn of its own."""


def turns(records: Sequence[Record], lengths: Sequence[int], mix: Mix, *, epoch: int, max_length: int) -> list[Turn]:
    """The turns of an epoch.

    Args:
        records: of one set.
        lengths: tokens of each as a sample of its own.
        mix: how they are put together.
        epoch: from 0.
        max_length: tokens of a turn at most; records whose lengths add up to more do not meet.

    Returns:
        Turns that hold every record once; in training, `weight` times on average.
    """
    showings = [Showing(n, copy, _task(record, mix, epoch, copy)) for n, record, copy in _shown(records, mix, epoch)]
    if mix.images_per_turn == 1:
        return [(showing,) for showing in showings]
    if mix.seed is not None:
        order = epoch_order(len(showings), seed=mix.seed, epoch=epoch, purpose="turns")
        showings = [showings[place] for place in order]
    return _grouped(showings, records, lengths, mix, max_length)


def _shown(records: Sequence[Record], mix: Mix, epoch: int) -> Iterator[tuple[int, Record, int]]:
    """(place, record, copy) of everything that an epoch shows: a weight of 2.3 is two copies, and a third in 30 %."""
    for place, record in enumerate(records):
        copies = 1
        if mix.seed is not None and record.weight != 1:
            whole = int(record.weight)
            copies = whole + (_chance(mix.seed, epoch, 0, "weight", record.id) < record.weight - whole)
        yield from ((place, record, copy) for copy in range(copies))


def _task(record: Record, mix: Mix, epoch: int, copy: int) -> Task:
    if not mix.summary_ratio or record.images[0].summary is None:
        return "dense"
    drawn = (mix.seed, epoch, copy) if mix.seed is not None else (0, 0, 0)
    return "summary" if _chance(*drawn, "task", record.id) < mix.summary_ratio else "dense"


def possible(record: Record, summary_ratio: float) -> list[Record]:
    """A record with each task that it can be drawn with."""
    both = [record, replace(record, task="summary")]
    if not summary_ratio or record.images[0].summary is None:
        return both[:1]
    return both[1:] if summary_ratio == 1 else both


def _grouped(
    showings: Sequence[Showing], records: Sequence[Record], lengths: Sequence[int], mix: Mix, max_length: int
) -> list[Turn]:
    """Showings in order, each put to the turn before it where both fit together: of one task, no record twice."""
    groups: list[list[Showing]] = []
    open_turns: dict[object, tuple[list[Showing], int, int]] = {}  # kind -> turn, its images, its tokens
    for showing in showings:
        record = records[showing.record]
        kind = (showing.task, record.domain if mix.seed is None else None)
        turn, images, tokens = open_turns.get(kind, ([], mix.images_per_turn + 1, 0))
        images, tokens = images + len(record.images), tokens + lengths[showing.record]
        itself = any(other.record == showing.record for other in turn)
        if images > mix.images_per_turn or tokens > max_length or itself:
            turn, images, tokens = [], len(record.images), lengths[showing.record]
            groups.append(turn)
        turn.append(showing)
        open_turns[kind] = (turn, images, tokens)
    return [tuple(turn) for turn in groups]


def _chance(seed: int, epoch: int, copy: int, purpose: str, record_id: str) -> float:
    return derived_seed(seed, purpose, epoch, copy, record_id) / 2**63


def shown(turn: Turn, records: Sequence[Record], mix: Mix, *, epoch: int, changed: bool = True) -> Record:
    """A turn as one record, augmented where the mix says so and `changed` is not False; no pixel is read."""
    parts = []
    for showing in turn:
        record = records[showing.record]
        record = replace(record, task=showing.task) if showing.task != record.task else record
        if mix.chain is not None and changed:
            record = mix.chain.change(record, epoch=epoch, copy=showing.copy)
        parts.append(record)
    return joined(parts)


def joined(records: Sequence[Record]) -> Record:
    """Several records as one turn: their images in order, their objects with them; one record is itself."""
    if len(records) == 1:
        return records[0]
    objects = []
    n_before = 0
    for record in records:
        objects += [replace(each, image=each.image + n_before) for each in record.objects]
        n_before += len(record.images)
    domains = {record.domain for record in records}
    return Record(
        id="+".join(record.id for record in records),
        images=tuple(picture for record in records for picture in record.images),
        objects=tuple(objects),
        domain=domains.pop() if len(domains) == 1 else None,
        task=records[0].task,
    )

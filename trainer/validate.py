"""Checks the data set of a configuration: everything that is wrong with it, what is suspicious, and its numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from trainer.budget import step_plan_from
from trainer.config.problems import counted, nearest
from trainer.config.resolved import Resolved
from trainer.config.schema import Config
from trainer.data.images import equal_files
from trainer.data.loader import SampleSet
from trainer.data.prompts import Taxonomy
from trainer.data.records import OPTIONAL_KEYS, Reading, Record, bad_records_error, check_records
from trainer.data.statistics import Epoch, Limit, Measured, SetStatistics, first_epoch, set_statistics, tried_limits
from trainer.data.suspicions import Subject, Suspicion, suspicions
from trainer.data.template import Encoder
from trainer.data.turns import possible
from trainer.datasets import check_first_epoch, check_summaries, files_from, make_encoder, mix_from, spread
from trainer.errors import DataError
from trainer.model import load_tools

_TRIED = 1_000
"""Keys of the user's own that are held against ours: beyond, keys are data."""


@dataclass(frozen=True)
class CheckedSet:
    """One file.

    Attributes:
        path: the JSONL file.
        n_records: in the file, bad ones too.
        faults: everything that is wrong with each bad record, by its id.
        records: what can be trained on; of a larger file `custom.max_records` of them.
        measured: those, and the sound ones that are too long.
        unread: key that nothing reads -> ids of the records that have it.
    """

    path: Path
    n_records: int
    faults: Mapping[str, tuple[str, ...]]
    records: tuple[Record, ...]
    measured: tuple[Measured, ...]
    unread: Mapping[str, Sequence[str]]

    def problems(self) -> list[str]:
        """One line for each fault, beginning with the record's id."""
        return [f"{name}{problem}" for name, of_record in self.faults.items() for problem in of_record]


@dataclass(frozen=True)
class Validation:
    """What is known of a data set.

    Attributes:
        resolved: the configuration that it was held against.
        sets: `train`, `val` and, where there is one, `ood`, but none that could not be read at all.
        statistics: of each of them.
        epoch: what the first epoch of training holds; None where there is nothing to train on.
        limits: what other length limits would do.
        errors: what training would refuse; empty where the data are sound.
        warnings: what it would not.
    """

    resolved: Resolved
    sets: Mapping[str, CheckedSet]
    statistics: Mapping[str, SetStatistics]
    epoch: Epoch | None
    limits: tuple[Limit, ...]
    errors: tuple[DataError, ...]
    warnings: tuple[Suspicion, ...]


def validate(resolved: Resolved, console: Console | None = None) -> Validation:
    """Read, check and measure all records of a configuration; no weights are loaded.

    Args:
        resolved: the configuration.
        console: where progress is shown where it is a terminal; standard error when not given.

    Raises:
        UserError: what is wrong is not in the records, but in the taxonomy or the model's folder.
    """
    config, console = resolved.config, console or Console(stderr=True)
    files = files_from(config)
    encoder = make_encoder(
        config, load_tools(config.model.model), Taxonomy.read(files.taxonomy) if files.taxonomy else None
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        sets, errors = _read(files.sets(), config, encoder, progress)
        measured = {name: each.measured for name, each in sets.items()}
        with _told(progress, "compare images"):
            paths = {p.path for of_set in measured.values() for each in of_set for p in each.record.images}
            subject = Subject(measured, encoder, equal_files(paths), config.custom.summary_ratio)
        with _told(progress, "look for what is suspicious"):
            noticed = suspicions(subject)
        with _told(progress, "pack"):
            samples = _samples(config, sets, encoder)
            epoch = first_epoch(step_plan_from(config, samples)) if samples is not None and samples.count(0) else None
            lengths = {name: [each.tokens.whole for each in of_set] for name, of_set in measured.items()}
            limits = tried_limits(lengths, config.max_length, seed=config.training.seed)
    return Validation(
        resolved=resolved,
        sets=sets,
        statistics={name: set_statistics(of_set, config.max_length) for name, of_set in measured.items()},
        epoch=epoch,
        limits=tuple(limits),
        errors=(*errors, *_refused(config, sets, samples)),
        warnings=(*_left_out(config, sets), *_misspelt(sets), *noticed),
    )


def _read(
    files: Mapping[str, Path], config: Config, encoder: Encoder, progress: Progress
) -> tuple[dict[str, CheckedSet], list[DataError]]:
    """Every file that can be read, and what hinders reading the others."""
    sets, errors = {}, []
    for name, path in files.items():
        try:
            with _told(progress, f"read {name}"):
                reading = check_records(path, allow_outside_root=config.custom.allow_outside_root)
        except DataError as error:
            errors.append(error)
        else:
            records = spread(reading.records, config.custom.max_records)
            tracked = progress.track(records, description=f"measure {name}")
            sets[name] = _measured(path, reading, tracked, encoder, config.custom.summary_ratio)
    return sets, errors


def _measured(
    path: Path, reading: Reading, records: Iterable[Record], encoder: Encoder, summary_ratio: float
) -> CheckedSet:
    """Hold sound records against the model's limits with every answer that they can be drawn with; keep the longest."""
    faults, fitting, measured = dict(reading.faults), [], []
    for record in records:
        tasks = possible(record, summary_ratio)
        if problem := next(filter(None, map(encoder.problem, tasks)), None):
            faults[record.id] = (problem,)
        else:
            fitting.append(record)
        if not encoder.image_problem(record):
            counts = map(encoder.token_counts, tasks)
            measured.append(Measured(record, max(counts, key=lambda tokens: tokens.whole)))
    return CheckedSet(path, reading.n_records, faults, tuple(fitting), tuple(measured), reading.unread)


def _samples(config: Config, sets: Mapping[str, CheckedSet], encoder: Encoder) -> SampleSet | None:
    """Of training; None where there is no record for it."""
    if "train" not in sets or not sets["train"].records:
        return None
    return SampleSet(sets["train"].records, encoder, mix_from(config, training=True))


def _refused(config: Config, sets: Mapping[str, CheckedSet], samples: SampleSet | None) -> Iterator[DataError]:
    """What training would refuse in the files that could be read, and in the samples that they make."""
    for each in sets.values():
        if each.faults and (config.custom.on_bad_record == "error" or not each.records):
            yield bad_records_error(each.path, each.problems(), n_bad=len(each.faults), n_records=each.n_records)
    if samples is not None:
        path = sets["train"].path
        for check in (
            partial(check_summaries, config, path, samples.records),
            partial(check_first_epoch, path, samples),
        ):
            try:
                check()
            except DataError as error:
                yield error


def _left_out(config: Config, sets: Mapping[str, CheckedSet]) -> Iterator[Suspicion]:
    """Bad records that training would leave out."""
    for name, each in sets.items():
        if each.faults and each.records and config.custom.on_bad_record == "skip":
            text = f"records of {name} that are left out (custom.on_bad_record: skip): {len(each.faults):,}"
            yield Suspicion("bad_records", text, tuple(each.problems()))


def _misspelt(sets: Mapping[str, CheckedSet]) -> Iterator[Suspicion]:
    """Keys that have no effect, and that are nearly one that would."""
    for name, each in sets.items():
        found = {key: meant for key in islice(each.unread, _TRIED) if (meant := nearest(key, OPTIONAL_KEYS))}
        if found:
            ids = {key: each.unread[key] for key in found}
            places = [f"{ids[key][0]}: {key!r}, in {counted(len(ids[key]), 'record')}; {found[key]}?" for key in found]
            text = f"keys of {name} that nothing reads, nearly those that are read: {len(found)}"
            yield Suspicion("misspelt_keys", text, tuple(places))


@contextmanager
def _told(progress: Progress, description: str) -> Iterator[None]:
    """Show what is being done while nobody knows how far it has come."""
    task = progress.add_task(description, total=None)
    try:
        yield
    finally:
        progress.remove_task(task)

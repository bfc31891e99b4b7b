"""Validation images with the truth and what each arm has said of them, side by side: what a loss cannot tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Literal, cast

from analysis.ranking import Ranking, Reading, nothing_ranked
from analysis.store import Store
from trainer import names
from trainer.data.answer import ParsedObject
from trainer.data.geometry import EmitNorm, Size
from trainer.data.records import Object, Record, read_records
from trainer.errors import UserError
from trainer.inference.repair import State, read_answer
from trainer.scoring import Score, pairs_of, score_image

Mark = Literal["found", "misnamed", "wrong", "missed"]
"""Of a predicted object: as in the truth; in its place under another type; of nothing. Of a true one: not found."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one arm has said of one image.

    Attributes:
        objects: in pixels, each with what it is worth.
        missed: objects of the truth that nothing was said of in their place.
        score: counts of this image.
        state: of the answer.
        text: the answer, as it was generated.
    """

    objects: tuple[tuple[Object, Mark], ...]
    missed: tuple[Object, ...]
    score: Score
    state: State
    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One image with its truth and what the arms say, in the order of the ranking.

    Attributes:
        record: with the objects of the truth, in pixels.
        said: arm -> what it says.
        disagreement: 1 - F1 between what two arms say, mean over all pairs of arms; of one arm, between it and truth.
    """

    record: Record
    said: Mapping[str, Said]
    disagreement: float

    @property
    def score(self) -> float:
        """F1 against the truth, mean over arms."""
        return fmean(each.score.f1 for each in self.said.values())


@dataclass(frozen=True, slots=True)
class Gallery:
    """What is shown.

    Attributes:
        arms: label -> the run that speaks for it.
        images: the most disagreeing first.
        notes: what to know, a line each.
    """

    arms: Mapping[str, Reading]
    images: tuple[Shown, ...]
    notes: tuple[str, ...]


def gather(store: Store, ranking: Ranking, *, seed: str | None, val_jsonl: Path | None, records: int) -> Gallery:
    """Put side by side what the arms of a ranking said of the validation images that they were scored on.

    Args:
        store: the store; nothing is generated anew, answers are artifacts of the runs.
        ranking: of at least one arm.
        seed: of the runs that are taken; None: the lowest that all arms have, else each arm's first.
        val_jsonl: where the validation records are now; None: where the runs say.
        records: images at most.

    Raises:
        UserError: no answers, no validation file, or another one than the runs were scored on.
    """
    if not ranking.rows:
        raise nothing_ranked(str(store))
    arms = chosen_runs(ranking, seed)
    answers = {label: _answers(store, reading) for label, reading in arms.items()}
    told = {label: found for label, found in answers.items() if found}
    notes = [f"{label} has no answers: it was run with tracking.generate_records 0" for label in arms.keys() - told]
    if not told:
        raise UserError(
            "gallery", "runs without generated answers", "runs with tracking.generate_records above 0",
            "train with it, as the default does",
        )  # fmt: skip
    known = _records(store, [arms[label] for label in told], val_jsonl)
    shared = [name for name in next(iter(told.values())) if all(name in found for found in told.values())]
    if left := [name for name in shared if name not in known]:
        notes.append(f"{len(left)} turns of several images are not shown")
    images = [
        _shown(known[name], {label: (arms[label], told[label][name]) for label in told})
        for name in shared
        if name in known
    ]
    if not images:
        raise UserError(
            "gallery",
            "arms that were scored on different images",
            "arms with images in common",
            "choose such arms with --where",
        )
    images.sort(key=lambda image: (-image.disagreement, image.score))
    if len(images) > records:
        notes.append(f"the {records} images of most disagreement, of {len(images)}")
    return Gallery({label: arms[label] for label in told}, tuple(images[:records]), tuple(notes))


def chosen_runs(ranking: Ranking, seed: str | None) -> dict[str, Reading]:
    """One run an arm, of one seed where that can be.

    Raises:
        UserError: an arm does not have the seed that was asked for.
    """
    seeds = {row.label: {reading.run.seed: reading for reading in row.readings} for row in ranking.rows}
    shared = set.intersection(*(set(of) for of in seeds.values()))
    if seed is not None and seed not in shared:
        lacking = next(label for label, of in seeds.items() if seed not in of)
        allowed = ", ".join(sorted(shared, key=_by_number)) or "none: these arms share no seed"
        raise UserError("--seed", f"{seed}, which {lacking} does not have", allowed, "take one of these")
    one = seed or (min(shared, key=_by_number) if shared else None)
    return {label: of[one] if one is not None else next(iter(of.values())) for label, of in seeds.items()}


def judged(record: Record, text: str, emit_norm: EmitNorm, shown: Size) -> Said:
    """What an answer is worth against the truth.

    Args:
        record: of one image.
        text: the answer.
        emit_norm: frame of its coordinates.
        shown: (width, height) of the image as the model has seen it.
    """
    reading = read_answer(text, record.size, emit_norm, shown)
    said, truth = [_parsed(o) for o in reading.objects], [_parsed(o) for o in record.objects]
    typed = dict(pairs_of(said, truth, same_type=True))
    located = dict(pairs_of(said, truth, same_type=False))
    marks: list[Mark] = ["found" if n in typed else "misnamed" if n in located else "wrong" for n in range(len(said))]
    met = {*typed.values(), *located.values()}
    missed = tuple(each for n, each in enumerate(record.objects) if n not in met)
    return Said(tuple(zip(reading.objects, marks, strict=True)), missed, score_image(said, truth), reading.state, text)


def _shown(record: Record, answers: Mapping[str, tuple[Reading, str]]) -> Shown:
    said = {}
    for label, (reading, text) in answers.items():
        emit_norm = cast(EmitNorm, reading.run.params["custom.emit_norm"])
        said[label] = judged(record, text, emit_norm, _seen(record.size, reading, emit_norm))
    objects = [[_parsed(o) for o, _ in each.objects] for each in said.values()]
    apart = [1 - _agreement(a, b) for a, b in combinations(objects, 2)]
    alone = [1 - each.score.f1 for each in said.values()]
    return Shown(record, said, fmean(apart or alone))


def _agreement(a: Sequence[ParsedObject], b: Sequence[ParsedObject]) -> float:
    return score_image(a, b).f1 if a or b else 1.0


def _seen(size: Size, reading: Reading, emit_norm: EmitNorm) -> Size:
    """The size of an image as the model was shown it; asked for only where coordinates are in its pixels."""
    if emit_norm != "none":
        return size
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limit = reading.run.params.get("template.max_pixels", "null")
    most = int(limit) if limit.isdecimal() else 2**50
    height, width = smart_resize(size[1], size[0], _FACTOR, min_pixels=_FACTOR**2, max_pixels=most)
    return width, height


_FACTOR = 32
"""Pixels a side of a token of Qwen3-VL: patches of 16, two by two."""


def _answers(store: Store, reading: Reading) -> dict[str, str]:
    """Record -> answer of a run's best checkpoint, else of its last."""
    for kind in ("best", "last"):
        if lines := store.artifact_lines(reading.run.id, f"{kind}_{names.ARTIFACT_PREDICTIONS}"):
            return {line["record_id"]: line["text"] for line in lines}
    return {}


def _records(store: Store, readings: Sequence[Reading], val_jsonl: Path | None) -> dict[str, Record]:
    """Validation records by their id, those that the runs were scored on.

    Raises:
        UserError: they are not there, or are others.
    """
    from trainer.facts import data_digest  # torch, which takes seconds

    first = readings[0].run
    path = val_jsonl or store.dataset_path(first.id, "val")
    do = "say where it is now: --val_jsonl FILE"
    if path is None or not path.is_file():
        raise UserError(f"run {first.name}", f"validation records in {path}, which is not there", "the file", do)
    found = read_records(path, on_bad_record="skip", allow_outside_root=True)
    digest = data_digest(found)
    if other := next((each.run for each in readings if each.run.tags.get(names.TAG_VAL_DIGEST) != digest), None):
        raise UserError(
            str(path), f"records with the digest {digest}",
            f"those that run {other.name} was scored on: {other.tags.get(names.TAG_VAL_DIGEST)}", do,
        )  # fmt: skip
    return {record.id: record for record in found.records if len(record.images) == 1}


def _parsed(item: Object) -> ParsedObject:
    return ParsedObject(item.geometry.kind, item.geometry.points, item.desc)


def _by_number(seed: str) -> tuple[int, str]:
    return (int(seed) if seed.lstrip("-").isdecimal() else 2**62, seed)

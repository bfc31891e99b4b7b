"""Scores generated captions against ground truth: precision, recall and F1 of objects. Pure numbers, no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.answer import ParsedObject
from trainer.data.geometry import Box, bounding_box, iou
from trainer.data.records import object_type

IOU_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over a set of images, and the fractions they give; a fraction over nothing is 0."""

    predicted: int = 0
    true: int = 0
    matched: int = 0
    """Pairs of one predicted and one true object with IoU >= 0.5 and equal type."""
    located: int = 0
    """Pairs with IoU >= 0.5, whatever their type."""
    located_with_type: int = 0
    """Those of them whose type is equal too."""
    attribute_f1_sum: float = 0.0
    """Sum over matched pairs of the F1 of their attribute sets."""

    def __add__(self, other: "Score") -> "Score":
        """The counts of two sets together."""
        mine, theirs = (
            (s.predicted, s.true, s.matched, s.located, s.located_with_type, s.attribute_f1_sum) for s in (self, other)
        )
        return Score(*(a + b for a, b in zip(mine, theirs, strict=True)))  # type: ignore[arg-type]  # five ints, a float

    @property
    def precision(self) -> float:
        """Matched over predicted objects."""
        return self.matched / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Matched over true objects."""
        return self.matched / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _f1(self.matched, self.predicted, self.true)

    @property
    def f1_attributes(self) -> float:
        """F1 in which a matched pair counts as much as its attributes agree."""
        return _f1(self.attribute_f1_sum, self.predicted, self.true)

    @property
    def class_accuracy(self) -> float:
        """Share of equal types among the pairs with IoU >= 0.5."""
        return self.located_with_type / self.located if self.located else 0.0


def score_image(predicted: Sequence[ParsedObject], true: Sequence[ParsedObject]) -> Score:
    """Match the objects of one record and count.

    Shapes are compared by their bounding boxes (both sides in the frame of the answer). Pairs are taken greedily from
    the highest IoU down, each object once: for `matched` among pairs of equal type, for `located` among all pairs.
    """
    typed = pairs_of(predicted, true, same_type=True)
    located = pairs_of(predicted, true, same_type=False)
    return Score(
        predicted=len(predicted),
        true=len(true),
        matched=len(typed),
        located=len(located),
        located_with_type=sum(object_type(predicted[p].desc) == object_type(true[t].desc) for p, t in located),
        attribute_f1_sum=sum(_attribute_f1(predicted[p].desc, true[t].desc) for p, t in typed),
    )


def attributes(desc: str) -> frozenset[str]:
    """All of `desc` behind the type, split at slashes and commas."""
    rest = desc.split("/")[1:]
    return frozenset(word.strip() for element in rest for word in element.replace("，", ",").split(",") if word.strip())


def pairs_of(
    predicted: Sequence[ParsedObject], true: Sequence[ParsedObject], *, same_type: bool
) -> list[tuple[int, int]]:
    """Pairs (place in `predicted`, place in `true`) with IoU >= 0.5, each object once, from the highest IoU down."""
    candidates = sorted(
        (
            (-overlap, p, t)
            for p, a in enumerate(predicted)
            for t, b in enumerate(true)
            if a.image == b.image
            and (not same_type or object_type(a.desc) == object_type(b.desc))
            and (overlap := iou(_box(a), _box(b))) >= IOU_THRESHOLD
        ),
    )
    taken_p: set[int] = set()
    taken_t: set[int] = set()
    pairs = []
    for _, p, t in candidates:
        if p not in taken_p and t not in taken_t:
            taken_p.add(p)
            taken_t.add(t)
            pairs.append((p, t))
    return pairs


def _box(item: ParsedObject) -> Box:
    """The bounding box, at least one unit wide and high: a level line and a box rounded flat have an area too."""
    x1, y1, x2, y2 = bounding_box(item.points)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _attribute_f1(predicted: str, true: str) -> float:
    a, b = attributes(predicted), attributes(true)
    return 1.0 if not a and not b else _f1(len(a & b), len(a), len(b))


def _f1(hits: float, predicted: int, true: int) -> float:
    return 2 * hits / (predicted + true) if predicted + true else 0.0

"""Precision, recall and F1 of objects, on cases worked out by hand."""

import pytest

from trainer.data.answer import ParsedObject
from trainer.data.records import object_type
from trainer.scoring import Score, attributes, score_image


def thing(x: float, desc: str, *, size: float = 10, image: int = 0) -> ParsedObject:
    """A square box at (x, 0)."""
    return ParsedObject("bbox_2d", (x, 0, x + size, size), desc, image)


def test_a_perfect_answer_scores_one() -> None:
    """Same boxes, same descriptions."""
    truth = [thing(0, "seven/red,large"), thing(50, "two/blue")]
    score = score_image(truth, truth)
    assert (score.f1, score.precision, score.recall, score.f1_attributes, score.class_accuracy) == (1, 1, 1, 1, 1)


def test_the_truth_scores_one_whatever_its_shapes() -> None:
    """A level line and a box that rounding has made flat have no area, and still find themselves."""
    truth = [
        ParsedObject("line", (0, 50, 90, 50), "kerb"),
        ParsedObject("bbox_2d", (20, 20, 20, 40), "pole"),
        ParsedObject("poly", (0, 0, 10, 0, 5, 8), "sign"),
    ]
    assert score_image(truth, truth).f1 == 1


def test_no_answer_scores_zero() -> None:
    """Nothing predicted is no error of division."""
    score = score_image([], [thing(0, "seven")])
    assert (score.f1, score.precision, score.recall, score.class_accuracy) == (0, 0, 0, 0)


def test_a_pair_counts_from_an_iou_of_one_half() -> None:
    """Boxes of 9 x 9 shifted by 3 share 54 of 108: exactly one half; a bit more is too far."""
    assert score_image([thing(3, "a", size=9)], [thing(0, "a", size=9)]).matched == 1
    assert score_image([thing(3.01, "a", size=9)], [thing(0, "a", size=9)]).matched == 0


def test_another_type_is_located_but_not_matched() -> None:
    """It lowers class accuracy and F1, and nothing else."""
    score = score_image([thing(0, "one/red")], [thing(0, "seven/red")])
    assert (score.matched, score.located, score.located_with_type) == (0, 1, 0)


def test_an_object_is_matched_once() -> None:
    """Saying the same thing twice costs precision."""
    score = score_image([thing(0, "a"), thing(0, "a")], [thing(0, "a")])
    assert (score.precision, score.recall) == (0.5, 1.0)
    assert score.f1 == pytest.approx(2 / 3)


def test_the_best_overlap_is_taken_first() -> None:
    """The nearer of two predictions gets the object, whatever their order."""
    near, far = thing(1, "a/right"), thing(3, "a/wrong")
    truth = [thing(0, "a/right")]
    assert score_image([far, near], truth).attribute_f1_sum == 1.0


def test_attributes_are_compared_as_sets() -> None:
    """red,large against red,small/rotated: one of two and one of three agree, F1 is 2 * 1 / 5."""
    score = score_image([thing(0, "a/red,large")], [thing(0, "a/red,small/rotated")])
    assert score.attribute_f1_sum == pytest.approx(0.4)
    assert attributes("a/red， large/rotated") == {"red", "large", "rotated"}
    assert object_type(" seven /red") == "seven"


def test_shapes_are_compared_by_their_bounding_boxes() -> None:
    """A box in place of the right quadrilateral still finds the object."""
    quad = ParsedObject("quad", (5, 0, 10, 5, 5, 10, 0, 5), "a")
    assert score_image([thing(0, "a")], [quad]).matched == 1


def test_objects_of_different_images_never_match() -> None:
    """The group that an object stands in is part of where it is."""
    assert score_image([thing(0, "a", image=1)], [thing(0, "a")]).matched == 0


def test_scores_add_up_over_images() -> None:
    """The F1 of a set is made from its counts, not the mean of its images' F1."""
    total = score_image([thing(0, "a")], [thing(0, "a")]) + score_image([], [thing(0, "a"), thing(50, "b")]) + Score()
    assert (total.matched, total.predicted, total.true) == (1, 1, 3)
    assert total.f1 == 0.5

"""Shapes: order, frames, overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.geometry import (
    EmitNorm,
    Geometry,
    bounding_box,
    count_problem,
    emit,
    from_left_end,
    iou,
    reading_key,
    to_pixels,
)

SIDES = st.integers(17, 5000)
NORMS: tuple[EmitNorm, ...] = ("norm1000", "norm100", "none")


@st.composite
def shapes(draw: st.DrawFn, width: int, height: int) -> Geometry:
    """A sound shape on an image of this size."""
    kind = draw(st.sampled_from(["bbox_2d", "quad", "poly", "line"]))
    n_points = {"bbox_2d": 2, "quad": 4}.get(kind) or draw(st.integers(3, 6))
    xs = draw(st.lists(st.floats(0, width), min_size=n_points, max_size=n_points))
    ys = draw(st.lists(st.floats(0, height), min_size=n_points, max_size=n_points))
    if kind == "bbox_2d":
        xs, ys = sorted(xs), sorted(ys)
    return Geometry(kind, tuple(v for pair in zip(xs, ys, strict=True) for v in pair))


@given(st.data(), SIDES, SIDES, st.sampled_from(NORMS))
def test_emitting_and_back_moves_a_point_by_at_most_half_a_unit(
    data: st.DataObject, width: int, height: int, norm: EmitNorm
) -> None:
    """Pixels -> integers of the answer -> pixels: half a unit of the frame is all that rounding may take."""
    shape = from_left_end(data.draw(shapes(width, height)))
    back = to_pixels(emit(shape, (width, height), norm), (width, height), norm)
    candidates = [back.points]
    if shape.kind == "line":  # rounding may bring both ends to the same x, and then the upper one comes first
        candidates.append(tuple(v for i in range(len(back.points) - 2, -1, -2) for v in back.points[i : i + 2]))
    unit = {"norm1000": (1000, 1000), "norm100": (100, 100), "none": (width, height)}[norm]
    half = [0.5 * side / each + 1e-6 for side, each in zip((width, height), unit, strict=True)]
    assert any(
        all(abs(a - b) <= half[i % 2] for i, (a, b) in enumerate(zip(shape.points, points, strict=True)))
        for points in candidates
    )


@given(st.data(), SIDES, SIDES, st.sampled_from(NORMS))
def test_emitted_numbers_are_whole_and_on_the_image(
    data: st.DataObject, width: int, height: int, norm: EmitNorm
) -> None:
    """0 to 1000, 0 to 100, or pixels of the image; emitting what was emitted changes nothing."""
    limits = {"norm1000": (1000, 1000), "norm100": (100, 100), "none": (width, height)}[norm]
    emitted = emit(data.draw(shapes(width, height)), (width, height), norm)
    assert all(isinstance(v, int) and 0 <= v <= limits[i % 2] for i, v in enumerate(emitted.points))
    assert emit(emitted, limits, "none") == emitted


@pytest.mark.parametrize(
    ("norm", "expected"),
    [("norm1000", (13, 500, 1000, 1000)), ("norm100", (1, 50, 100, 100)), ("none", (5, 50, 400, 100))],
)
def test_halves_round_up(norm: EmitNorm, expected: tuple[int, ...]) -> None:
    """5 of 400 pixels are 12.5 thousandths: 13, not 12 as rounding to even would say."""
    assert emit(Geometry("bbox_2d", (5, 50, 400, 100)), (400, 100), norm).points == expected


def test_pixels_follow_the_image_that_the_model_is_shown() -> None:
    """Without normalisation coordinates scale with a resized image; normalised ones do not change."""
    box = Geometry("bbox_2d", (10, 20, 50, 100))
    assert emit(box, (100, 200), "none", (50, 50)).points == (5, 5, 25, 25)
    assert emit(box, (100, 200), "norm1000", (50, 50)) == emit(box, (100, 200), "norm1000")
    assert to_pixels(Geometry("bbox_2d", (5, 5, 25, 25)), (100, 200), "none", (50, 50)) == box


def test_a_line_starts_at_its_leftmost_end() -> None:
    """At equal x the upper end comes first; only lines are turned."""
    assert from_left_end(Geometry("line", (9, 1, 5, 5, 2, 3))).points == (2, 3, 5, 5, 9, 1)
    assert from_left_end(Geometry("line", (4, 9, 4, 2))).points == (4, 2, 4, 9)
    assert from_left_end(Geometry("line", (2, 3, 9, 1))).points == (2, 3, 9, 1)
    assert from_left_end(Geometry("poly", (9, 1, 5, 5, 2, 3))).points == (9, 1, 5, 5, 2, 3)


def test_reading_order_is_top_to_bottom_then_left_to_right() -> None:
    """By the upper left corner of the bounding box, whatever the shape."""
    top = Geometry("line", (50, 1, 60, 9))
    left = Geometry("bbox_2d", (0, 5, 3, 8))
    right = Geometry("quad", (7, 9, 4, 8, 4, 5, 8, 8))
    assert sorted([right, left, top], key=reading_key) == [top, left, right]


@given(st.data())
def test_reading_order_does_not_depend_on_the_order_before(data: st.DataObject) -> None:
    """Any permutation sorts to the same sequence, and sorting twice changes nothing."""
    items = data.draw(st.lists(shapes(40, 40), max_size=8))
    shuffled = data.draw(st.permutations(items))
    once = sorted(items, key=reading_key)
    assert [g.points for g in once] == [g.points for g in sorted(shuffled, key=reading_key)]
    assert sorted(once, key=reading_key) == once


@pytest.mark.parametrize(
    ("kind", "n", "fault"),
    [
        *[("bbox_2d", 4, None), ("quad", 8, None), ("line", 4, None), ("poly", 6, None), ("poly", 12, None)],
        *[("bbox_2d", 6, "6 numbers instead of 4"), ("quad", 4, "4 numbers instead of 8")],
        *[("line", 5, "odd"), ("line", 2, "1 points, fewer than 2"), ("poly", 4, "2 points, fewer than 3")],
    ],
)
def test_each_shape_has_its_number_of_coordinates(kind: str, n: int, fault: str | None) -> None:
    """Box 4, quad 8, line 4 or more, polygon 6 or more, always even."""
    problem = count_problem(kind, n)  # type: ignore[arg-type]
    assert problem is None if fault is None else problem is not None and fault in problem


def test_iou_by_hand() -> None:
    """Equal 1, quarter overlap 1/7, apart or touching or empty 0."""
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == iou((0, 0, 2, 2), (5, 5, 6, 6)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == iou((3, 3, 1, 1), (0, 0, 4, 4)) == 0


def test_bounding_box_of_any_points() -> None:
    """Smallest upright box."""
    assert bounding_box((5, 1, 2, 8, 3, 3)) == (2, 1, 5, 8)

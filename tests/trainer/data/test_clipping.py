"""Clipping: what an edge leaves of a shape, and how much of it that is, whatever the shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.clipping import clip
from trainer.data.geometry import bounding_box

CANVAS = (100, 100)


def test_a_concave_polygon_is_cut_to_its_largest_piece() -> None:
    """A comb lying across the edge falls into teeth; the share is that of the piece."""
    comb = (-10, 0, 20, 0, 20, 10, -5, 10, -5, 20, 10, 20, 10, 30, -10, 30)
    points, share = clip(comb, CANVAS, is_line=False)
    assert bounding_box(points) == (0, 0, 20, 10)
    assert share == pytest.approx(200 / (30 * 10 + 5 * 10 + 20 * 10))
    assert points[:4] in ((20, 0, 20, 10), (0, 0, 20, 0), (20, 10, 0, 10), (0, 10, 0, 0))  # the same way round
    assert clip((-10, 5, 5, 5, 5, -5, 40, -5, 40, 30), CANVAS, is_line=True)[0] == (40, 0, 40, 30)


@pytest.mark.parametrize(
    ("points", "expected", "share"),
    [
        ((20, 50, 60, 50, 60, 80, 40, 80, 40, -20), (20, 50, 60, 50, 60, 80, 40, 80, 40, 0), 170 / 190),
        ((-20, 50, 60, 50, 20, 50, 80, 50), (0, 50, 60, 50, 20, 50, 80, 50), 160 / 180),
        ((-10, 0, 50, 0, 50, 50), (0, 0, 50, 0, 50, 50), 100 / 110),
        ((100, -10, 100, 60), (100, 0, 100, 60), 60 / 70),
        ((100, 50, 150, 50), (), 0),
        ((-10, 10, 10, -10), (), 0),
        ((-5, -5, -5, -5), (), 0),
    ],
    ids=["loop", "there and back", "along the edge", "on the edge", "touches the edge", "touches a corner", "a point"],
)
def test_a_line_is_cut_where_the_edge_cuts_it_and_nowhere_else(
    points: tuple[float, ...], expected: tuple[float, ...], share: float
) -> None:
    """Not where it crosses or covers itself; what lies on the edge itself is visible."""
    left, covered = clip(points, CANVAS, is_line=True)
    assert left == pytest.approx(expected)
    assert covered == pytest.approx(share)


def test_a_quad_with_its_corners_in_crossing_order_is_cut_as_what_they_enclose() -> None:
    """Upper left, upper right, lower left, lower right: an edge that cuts a tenth does not cut half."""
    points, share = clip((-10, 10, 90, 10, -10, 60, 90, 60), CANVAS, is_line=False)
    assert bounding_box(points) == (0, 10, 90, 60)
    assert (len(points), share) == (8, pytest.approx(0.9))


ends = st.tuples(*[st.floats(-50, 150)] * 4)


@given(ends=ends, places=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=3, max_size=6))
def test_an_outline_without_area_is_whole_or_gone(ends: tuple[float, ...], places: list[float]) -> None:
    """Corners on one line, some of them twice, are legal in a record; an edge leaves no outline of them."""
    x1, y1, x2, y2 = ends
    flat = tuple(value for at in places for value in (x1 + at * (x2 - x1), y1 + at * (y2 - y1)))
    points, share = clip(flat, CANVAS, is_line=False)
    assert (len(points), share) in ((len(flat), 1.0), (0, 0.0))


@given(points=st.lists(st.floats(-100, 200), min_size=6, max_size=16).filter(lambda points: len(points) % 2 == 0))
def test_what_is_left_of_any_outline_is_an_outline_inside(points: list[float]) -> None:
    """Three points or more, and never more than there was; cut again, nothing of it is lost."""
    left, share = clip(points, CANVAS, is_line=False)
    if not left:
        assert share == 0
        return
    assert len(left) >= 6 and 0 < share <= 1
    x1, y1, x2, y2 = bounding_box(left)
    assert x1 >= 0 and y1 >= 0 and x2 <= 100 and y2 <= 100
    assert clip(left, CANVAS, is_line=False) == (left, 1.0)

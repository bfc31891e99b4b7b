"""Augmentation: labels lie where their pixels lie, whatever the chain; edges cut, drop and mark; draws repeat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.config.augmentation import PARAMS
from trainer.data.augment import OPERATIONS, Chain, Rules, Step
from trainer.data.geometry import Geometry, bounding_box, count_problem, emit, to_pixels
from trainer.data.records import Object, Picture, Record
from trainer.data.warp import FILL, Warp

WIDTH, HEIGHT = 120, 88
GEOMETRIC = (
    *("hflip", "vflip", "rotate", "scale", "resize_by_scale", "pad_to_multiple", "expand_to_fit_affine"),
    *("random_crop", "center_crop"),
)
KEEP_ALL = Rules(min_coverage=0.0, partial_word="")


def record(*objects: Object, width: int = WIDTH, height: int = HEIGHT, id: str = "r.jsonl:1") -> Record:
    """A record of one image that nobody reads."""
    return Record(id, (Picture(Path("a.png"), width, height),), objects)


def box(x1: float, y1: float, x2: float, y2: float, desc: str = "car/red") -> Object:
    """An object with a box."""
    return Object(Geometry("bbox_2d", (x1, y1, x2, y2)), desc)


def line(*points: float, desc: str = "wire") -> Object:
    """An object with a line."""
    return Object(Geometry("line", points), desc)


def change(what: Record, *steps: tuple[str, dict[str, Any]], rules: Rules = KEEP_ALL, seed: int = 0) -> Record:
    """A record after a chain in which every operation is done."""
    whole = tuple(Step(name, 1.0, _params(name, params)) for name, params in steps)
    return Chain(whole, rules, seed).change(what, epoch=0)


def _params(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return PARAMS[name].model_validate(params).model_dump(exclude={"prob"})


def drawn(after: Record, pixels: np.ndarray) -> np.ndarray:
    """The pixels of a record whose image has these pixels on disk."""
    warp = after.images[0].warp
    return pixels if warp is None else warp.render(pixels)


@st.composite
def geometric_steps(draw: st.DrawFn) -> list[tuple[str, dict[str, Any]]]:
    """One to six geometric operations with parameters of their own."""
    steps = []
    for name in draw(st.lists(st.sampled_from(GEOMETRIC), min_size=1, max_size=6)):
        params: dict[str, Any] = {}
        if name == "rotate":
            params["max_deg"] = draw(st.sampled_from([0, 5, 30, 180]))
        elif name in ("scale", "resize_by_scale"):
            lo = draw(st.sampled_from([0.6, 0.9, 1.0]))
            params |= {"lo": lo, "hi": lo * draw(st.sampled_from([1.0, 1.3, 1.7]))}
            params |= {"align_multiple": draw(st.sampled_from([1, 8, 32]))} if name == "resize_by_scale" else {}
        elif name in ("pad_to_multiple", "expand_to_fit_affine"):
            params["multiple"] = draw(st.sampled_from([1, 16, 50]))
        elif name in ("random_crop", "center_crop"):
            params |= {"min_coverage": 0.0, "min_objects": 0, "skip_if_line": False}
            params["scale"] = [0.4, 1.0] if name == "random_crop" else draw(st.sampled_from([0.4, 0.81, 1.0]))
        steps.append((name, params))
    return steps


chains = given(steps=geometric_steps(), seed=st.integers(0, 2**32 - 1))
boxes = st.tuples(st.integers(2, 80), st.integers(2, 60), st.integers(12, 36), st.integers(10, 24)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@chains
@settings(max_examples=200, deadline=None)
@example(steps=[("rotate", {"max_deg": 30}), ("center_crop", {"scale": 0.5}), ("rotate", {"max_deg": 30})], seed=1)
def test_a_marker_at_every_point_is_found_at_the_point_it_became(steps: list, seed: int) -> None:
    """To half a pixel, for the corners of quads and polygons and the points of lines, on any canvas."""
    shapes = [
        Geometry("quad", (40, 30, 70, 36, 66, 60, 38, 52)),
        Geometry("poly", (60, 20, 84, 34, 72, 70, 50, 60, 44, 36)),
        Geometry("line", (30, 60, 60, 44, 90, 50)),
    ]
    before = record(*(Object(shape, "x") for shape in shapes))
    after = change(before, *steps, seed=seed)
    labels = {label.geometry.kind: label.geometry.points for label in after.objects}
    for shape in shapes:
        found = [_found(after, point) for point in _pairs(shape.points)]
        if any(spot is None for spot in found) or len(labels.get(shape.kind, ())) != len(shape.points):
            continue  # cut by an edge: the next test
        points = np.array(_pairs(labels[shape.kind]))
        for spot in found:
            assert np.min(np.hypot(*(points - spot).T)) <= 0.5
        if shape.kind == "line":
            assert all(np.hypot(*(a - b)) <= 0.5 for a, b in zip(points, found, strict=True))


@chains
@settings(max_examples=200, deadline=None)
@example(steps=[("center_crop", {"scale": 0.4, "min_objects": 0}), ("rotate", {"max_deg": 180})], seed=3)
@example(steps=[("scale", {"lo": 1.7, "hi": 1.7}), ("expand_to_fit_affine", {})], seed=3)
def test_the_pixels_of_a_box_are_those_inside_its_label(steps: list, seed: int) -> None:
    """Up to the rim where two pixels blend, inside are the object's and outside are not; a lost label has no pixels."""
    x1, y1, x2, y2 = (40, 24, 70, 50)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    after = change(record(box(x1, y1, x2, y2), box(0, 0, WIDTH, HEIGHT, "all")), *steps, seed=seed)
    shows = drawn(after, pixels)[..., 0].astype(int) - FILL > 64
    own = [label for label in after.objects if label.desc == "car/red"]
    if not own:
        assert shows.sum() <= 4  # a corner of less than a pixel has no label and may still lighten one
        return
    outline = np.array(_pairs(own[0].geometry.points), np.float32)
    if own[0].geometry.kind == "bbox_2d":
        a, b, c, d = own[0].geometry.points
        outline = np.array([(a, b), (c, b), (c, d), (a, d)], np.float32)
    warp = after.images[0].warp
    zoom = 1.0 if warp is None else abs(warp.matrix[0] * warp.matrix[4] - warp.matrix[1] * warp.matrix[3]) ** 0.5
    rim = 0.25 + 0.5 * max(1.0, zoom)  # an edge is blended over one pixel of the image on disk
    for (row, column), is_object in np.ndenumerate(shows):
        depth = cv2.pointPolygonTest(outline, (column + 0.5, row + 0.5), True)
        if depth > rim:
            assert is_object, (row, column, depth)
        if depth < -rim:
            assert not is_object, (row, column, depth)


@chains
@settings(max_examples=200, deadline=None)
def test_every_label_is_sound_and_inside_the_image(steps: list, seed: int) -> None:
    """The right number of points, none beyond an edge, nothing empty; in norm1000 and back within half a unit."""
    before = record(
        box(0, 0, 30, 20),
        box(100, 70, WIDTH, HEIGHT),
        Object(Geometry("quad", (40, 30, 70, 36, 66, 60, 38, 52)), "x"),
        Object(Geometry("poly", (2, 2, 110, 8, 20, 20, 100, 80, 5, 60)), "concave"),
        Object(Geometry("poly", (10, 10, 60, 60, 60, 10, 10, 60)), "crossing itself"),
        line(0, 0, 60, 80, 119, 0),
    )
    after = change(before, *steps, seed=seed)
    width, height = after.size
    for label in after.objects:
        geometry = label.geometry
        assert count_problem(geometry.kind, len(geometry.points)) is None
        x1, y1, x2, y2 = bounding_box(geometry.points)
        assert x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height
        assert x1 < x2 or y1 < y2
        back = to_pixels(emit(geometry, after.size, "norm1000"), after.size, "norm1000").points
        apart = [abs(a - b) for a, b in zip(sorted(back), sorted(geometry.points), strict=True)]
        assert max(apart) <= max(width, height) / 2000 + 1e-9


@pytest.mark.parametrize("flip", ["hflip", "vflip"])
@given(shape=boxes)
@settings(max_examples=30, deadline=None)
def test_a_flip_twice_is_the_identity(flip: str, shape: tuple[int, int, int, int]) -> None:
    """Labels and pixels; once, pixels are copied exactly."""
    before = record(box(*shape), Object(Geometry("quad", (40, 30, 70, 36, 66, 60, 38, 52)), "x"), line(1, 2, 3, 9))
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    once, twice = change(before, (flip, {})), change(before, (flip, {}), (flip, {}))
    assert twice.objects == before.objects
    assert np.array_equal(drawn(twice, pixels), pixels)
    assert np.array_equal(drawn(once, pixels), pixels[:, ::-1] if flip == "hflip" else pixels[::-1])


def test_corners_keep_their_places_in_a_mirror() -> None:
    """A quad goes clockwise from its upper left corner before and after; a line just has its points moved."""
    quad = Object(Geometry("quad", (10, 10, 50, 20, 48, 40, 8, 30)), "x")
    after = change(record(quad, line(10, 10, 50, 20)), ("hflip", {}))
    assert after.objects[0].geometry.points == (70, 20, 110, 10, 112, 30, 72, 40)
    assert after.objects[1].geometry.points == (110, 10, 70, 20)


@pytest.mark.parametrize(("turned_boxes", "kind"), [("quad", "quad"), ("bbox_2d", "bbox_2d")])
def test_a_turned_box_is_a_quad_or_the_box_around_it(turned_boxes: str, kind: str) -> None:
    """By option; the upright box is taken once, at the end, so that turning back gives the first box again."""
    rules = Rules(turned_boxes=turned_boxes)
    turn = ("rotate", {"max_deg": 30})
    after = change(record(box(40, 30, 70, 50)), turn, rules=rules, seed=4)
    assert after.objects[0].geometry.kind == kind
    quad = change(record(box(40, 30, 70, 50)), turn, seed=4).objects[0].geometry
    if kind == "bbox_2d":
        assert after.objects[0].geometry.points == pytest.approx(bounding_box(quad.points))


def test_expanding_uncovers_what_a_rotation_and_a_zoom_moved_out() -> None:
    """Nothing is cut off: every label is whole, every pixel of the image is there, the sides are multiples."""
    before = record(box(0, 0, 20, 20), box(100, 68, WIDTH, HEIGHT))
    steps = [("rotate", {"max_deg": 30}), ("scale", {"lo": 1.5, "hi": 1.5}), ("expand_to_fit_affine", {"multiple": 32})]
    rules = Rules(completeness_threshold=1.0, partial_word="cut")
    after = change(before, *steps, rules=rules, seed=2)
    assert [label.desc for label in after.objects] == ["car/red"] * 2
    assert all(side % 32 == 0 for side in after.size)
    white = drawn(after, np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    assert (white == 255).all(2).sum() == pytest.approx(1.5**2 * WIDTH * HEIGHT, rel=0.005)  # whole pixels at the rim
    without = change(before, *steps[:2], rules=rules, seed=2)
    assert without.objects == () or without.size == before.size


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"min_coverage": 0.3}, ["whole", "half/partly visible"]),
        ({"min_coverage": 0.6}, ["whole"]),
        ({"min_coverage": 0.3, "completeness_threshold": 0.4}, ["whole", "half"]),
        ({"min_coverage": 0.6, "min_objects": 2}, ["whole", "half", "outside"]),
    ],
)
def test_a_crop_drops_marks_or_is_not_done(params: dict[str, Any], expected: list[str]) -> None:
    """By the share that stays visible; with too few labels left the record stays as it is."""
    # the middle quarter of the area: from (30, 22) to (90, 66)
    before = record(box(40, 30, 60, 50, "whole"), box(20, 30, 40, 50, "half"), box(0, 0, 20, 20, "outside"))
    after = change(before, ("center_crop", {"scale": 0.25, **params}), rules=Rules())
    assert [label.desc for label in after.objects] == expected
    assert after.size == ((WIDTH, HEIGHT) if "outside" in expected else (60, 44))


def test_what_several_edges_cut_off_adds_up() -> None:
    """Two crops that each leave seven tenths leave half: dropped under a bound of 0.6."""
    before = record(box(10, 30, 50, 50))  # the first crop takes 12 pixels of 40, the second 10 more
    crop = ("center_crop", {"scale": (76 / WIDTH) ** 2, "min_coverage": 0.6})
    second = ("center_crop", {"scale": (56 / 76) ** 2, "min_coverage": 0.6, "min_objects": 0})
    assert len(change(before, crop, rules=Rules()).objects) == 1
    kept = record(*before.objects, box(55, 40, 60, 50, "kept"))
    assert [label.desc for label in change(kept, crop, second, rules=Rules()).objects] == ["kept"]


@pytest.mark.parametrize(
    ("points", "skip", "done"),
    [
        ((40, 30, 80, 60), True, True),
        ((0, 0, 10, 10), True, True),
        ((0, 30, 80, 60), True, False),
        ((0, 30, 80, 60), False, True),
    ],
)
def test_a_crop_across_a_line_is_not_done(points: tuple[float, ...], skip: bool, done: bool) -> None:
    """Unless told otherwise; lines inside or outside as a whole do not matter."""
    before = record(box(40, 30, 60, 50), line(*points))
    after = change(before, ("center_crop", {"scale": 0.25, "skip_if_line": skip}), rules=Rules())
    assert (after.size == (60, 44)) is done


@pytest.mark.parametrize(
    ("complete", "partial", "desc", "expected"),
    [
        (None, "partly visible", "car", "car/partly visible"),
        (None, "partly visible", "car/red", "car/red,partly visible"),
        (None, "partly visible", "car/red/parked/dirty", "car/red,partly visible/parked/dirty"),
        (None, "partly visible", "car//occluded", "car/partly visible/occluded"),
        (None, "partly visible", "car/red / occluded", "car/red,partly visible / occluded"),
        (None, "partly visible", "car/", "car/partly visible"),
        (None, "", "car/red", "car/red"),
        ("whole", "cut", "car/red,whole/parked", "car/red,cut/parked"),
        ("whole", "cut", "car/unwhole", "car/unwhole,cut"),
        ("显示完整", "只显示部分", "螺丝/显示完整，拧紧", "螺丝/只显示部分，拧紧"),
        ("whole", "cut", "car/red, whole/parked", "car/red, cut/parked"),
        (None, "cut", "car/red,cut/parked", "car/red,cut/parked"),
        ("显示完整", "只显示部分", "螺丝/只显示部分，拧紧", "螺丝/只显示部分，拧紧"),
    ],
)
def test_the_mark_of_a_partial_object(complete: str | None, partial: str, desc: str, expected: str) -> None:
    """In the place of the word for whole, else as one more attribute; once, and unless there is no word."""
    rules = Rules(complete_word=complete, partial_word=partial)
    after = change(record(box(20, 30, 40, 50, desc)), ("center_crop", {"scale": 0.25}), rules=rules)
    assert [label.desc for label in after.objects] == [expected]


def test_published_noise_keeps_the_labels_of_what_left_the_view() -> None:
    """The canvas does not grow, crops are not done, and a label without pixels stays at the edge."""
    before = record(box(50, 40, 70, 50, "middle"), box(0, 0, 10, 10, "corner"))
    steps = [
        ("scale", {"lo": 2, "hi": 2}),
        ("expand_to_fit_affine", {}),
        ("center_crop", {"scale": 0.25}),
    ]
    noisy = change(before, *steps, rules=Rules(keep_lost=True))
    assert noisy.size == before.size
    assert {label.desc: label.geometry.points for label in noisy.objects} == {
        "middle": (40, 36, 80, 56),
        "corner": (0, 0, 0, 0),
    }
    clean = change(before, steps[0], rules=Rules())
    assert [label.desc for label in clean.objects] == ["middle"]


def test_a_clean_and_a_noisy_run_turn_and_zoom_alike() -> None:
    """What one operation draws does not depend on which others are done."""
    steps = (
        Step("expand_to_fit_affine", 1.0, {"multiple": 1}),
        Step("rotate", 0.5, {"max_deg": 20}),
        Step("scale", 0.5, {"lo": 0.8, "hi": 1.5}),
    )
    for epoch in range(20):
        clean, noisy = (
            Chain(steps, Rules(keep_lost=noise), 17).change(record(box(50, 40, 70, 50)), epoch=epoch)
            for noise in (False, True)
        )
        one, other = (after.images[0].warp or Warp.of(after.size) for after in (clean, noisy))
        assert one.matrix == other.matrix


def test_draws_depend_on_seed_epoch_copy_and_record_alone() -> None:
    """Equal ones give equal changes, whatever was asked before; others give others."""
    chain = Chain((Step("rotate", 1.0, {"max_deg": 20}),), KEEP_ALL, seed=17)
    one = record(box(50, 40, 70, 50))
    first = chain.change(one, epoch=3)
    others = [
        chain.change(one, epoch=4),
        chain.change(one, epoch=3, copy=1),
        chain.change(record(box(50, 40, 70, 50), id="r.jsonl:2"), epoch=3),
        Chain(chain.steps, KEEP_ALL, seed=18).change(one, epoch=3),
    ]
    assert chain.change(one, epoch=3) == first
    assert len({other.images[0].warp for other in [first, *others]}) == 5


def test_prob_and_bypass_are_shares_of_the_samples() -> None:
    """Of 2,000 records within three standard errors."""
    one = record(box(50, 40, 70, 50))
    steps = (Step("hflip", 0.3),)

    def share(chain: Chain) -> float:
        return sum(chain.change(one, epoch=n).images[0].warp is not None for n in range(2000)) / 2000

    assert share(Chain(steps, KEEP_ALL, 1)) == pytest.approx(0.3, abs=0.031)
    assert share(Chain(steps, KEEP_ALL, 1, bypass_prob=0.5)) == pytest.approx(0.15, abs=0.024)


def test_a_record_of_which_nothing_would_be_left_stays_as_it_is() -> None:
    """A sample without objects teaches nothing."""
    before = record(box(0, 0, 10, 10))
    assert change(before, ("scale", {"lo": 3, "hi": 3}), rules=Rules()) is before


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_a_canvas_larger_than_an_image_may_be_is_not_drawn(factor: float) -> None:
    """In pixels, though neither side is too long; `max_pixels` would hide it from the count of tokens."""
    before = record(box(0, 0, 4000, 4000), width=4000, height=4000)
    after = change(before, ("resize_by_scale", {"lo": factor, "hi": factor}))
    assert (after is before) is (factor == 5)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - set(GEOMETRIC)))
def test_a_change_of_colour_leaves_labels_and_fill_alone(name: str) -> None:
    """It changes pixels, the same way each time; the fill around a smaller image stays as it is."""
    ramp = np.linspace(20, 230, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3)
    pixels = (ramp + np.random.default_rng(0).normal(0, 15, ramp.shape)).clip(0, 255).astype(np.uint8)
    params = {"posterize": {"bits": 2}, "auto_contrast": {"cutoff": 5}}.get(name, {})
    before = record(box(50, 40, 70, 50))
    after = change(before, (name, params), seed=1)
    assert after.objects == before.objects
    assert not np.array_equal(drawn(after, pixels), pixels)
    assert np.array_equal(drawn(after, pixels), drawn(change(before, (name, params), seed=1), pixels))
    smaller = change(before, ("scale", {"lo": 0.5, "hi": 0.5}), (name, params))
    assert (drawn(smaller, pixels)[0] == FILL).all()


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("color_jitter", {"brightness": [0.5, 0.5], "contrast": 0, "saturation": 0}, (50, 100, 25)),
        ("gamma", {"gamma": [2, 2]}, (39, 157, 10)),
        ("hsv", {"hue_delta_deg": [120, 120], "sat": 0, "val": 0}, (50, 100, 200)),
        ("solarize", {"threshold": 150}, (100, 55, 50)),
        ("posterize", {"bits": 1}, (0, 128, 0)),
    ],
)
def test_colours_by_hand(name: str, params: dict[str, Any], expected: tuple[int, int, int]) -> None:
    """On one colour whose outcome can be worked out."""
    pixels = np.full((HEIGHT, WIDTH, 3), (100, 200, 50), np.uint8)
    assert tuple(drawn(change(record(box(1, 1, 9, 9)), (name, params)), pixels)[5, 5]) == expected


def test_the_table_holds_the_operations_of_existing_files() -> None:
    """Names and parameters as configured are those that are done."""
    assert set(OPERATIONS) == set(PARAMS)


def test_an_unchanged_image_is_not_drawn_again() -> None:
    """No copy, no interpolation."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert Warp.of((WIDTH, HEIGHT)).render(pixels) is pixels


def _pairs(points: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(points[0::2], points[1::2], strict=True))


def _found(after: Record, point: tuple[float, float]) -> np.ndarray | None:
    """Where a spot of 6 x 6 pixels around a point is after the change; None where an edge is near."""
    x, y = (round(value) for value in point)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y - 3 : y + 3, x - 3 : x + 3] = 255
    warp = after.images[0].warp
    mask = np.ones_like(pixels) * 200
    shows = (mask if warp is None else warp.render(mask))[..., 0] == 200
    spot = drawn(after, pixels)[..., 0].astype(float) * shows
    whole = 36 * (1 if warp is None else abs(warp.matrix[0] * warp.matrix[4] - warp.matrix[1] * warp.matrix[3])) * 255
    if spot.sum() < 0.97 * whole:
        return None
    rows, columns = np.indices(spot.shape) + 0.5
    return np.array([(columns * spot).sum(), (rows * spot).sum()]) / spot.sum()

"""What a model says becomes objects on the image; each repair is counted under its own name."""

import json

import pytest

from trainer.inference.repair import BROKEN, CLIPPED, CUT, EMPTY, OUTSIDE, TURNED, TWICE, Reading, read_answer

SIZE = (200, 100)


def read(*objects: dict[str, object]) -> Reading:
    """An answer of whole JSON about an image of 200 x 100 pixels, in norm100."""
    return read_text(json.dumps({"image_1": {f"object_{n}": each for n, each in enumerate(objects, 1)}}))


def read_text(text: str) -> Reading:
    """Any text."""
    return read_answer(text, SIZE, "norm100", SIZE)


def box(*points: float) -> dict[str, object]:
    """A box called one."""
    return {"bbox_2d": list(points), "desc": "one"}


def test_a_sound_answer_is_in_pixels_and_nothing_is_counted() -> None:
    """Half of a norm100 frame is half of each side."""
    found = read(box(10, 10, 50, 50), {"line": [0, 0, 100, 100], "line_points": 2, "desc": "wire"})
    assert found.state == "sound"
    assert not found.repairs
    assert [o.geometry.points for o in found.objects] == [(20, 10, 100, 50), (0, 0, 200, 100)]


@pytest.mark.parametrize(
    ("objects", "repair", "points"),
    [
        ([box(50, 50, 10, 10)], TURNED, [(20, 10, 100, 50)]),
        ([box(10, 10, 50, 130)], CLIPPED, [(20, 10, 100, 100)]),
        ([box(110, 10, 130, 50)], OUTSIDE, []),
        ([box(10, 10, 10, 50)], EMPTY, []),
        ([box(10, 10, 50, 50), box(10, 10, 50, 50)], TWICE, [(20, 10, 100, 50)]),
        ([box(10, 10, 50, 50), {"desc": "nothing of a shape"}], BROKEN, [(20, 10, 100, 50)]),
        ([box(10, 10, 50, 50), box(1, 2, 3)], BROKEN, [(20, 10, 100, 50)]),
    ],
)
def test_what_is_wrong_with_an_object_is_mended_or_left_out(
    objects: list[dict[str, object]], repair: str, points: list[tuple[float, ...]]
) -> None:
    """And counted once."""
    found = read(*objects)
    assert found.state == "repaired"
    assert dict(found.repairs) == {repair: 1}
    assert [o.geometry.points for o in found.objects] == points


def test_of_a_cut_answer_whole_objects_are_kept() -> None:
    """The model was stopped in the middle of the second."""
    found = read_text('{"image_1":{"object_1":{"bbox_2d":[10,10,50,50],"desc":"one"},"object_2":{"bbox_2d":[1')
    assert found.state == "repaired"
    assert dict(found.repairs) == {CUT: 1}
    assert len(found.objects) == 1


@pytest.mark.parametrize("text", ["", "I cannot see anything.", "[1, 2]", '{"image_1": 3}', "{" * 5000, '"\\ud800"'])
def test_what_is_no_answer_is_unreadable_and_raises_nothing(text: str) -> None:
    """Whatever comes."""
    assert read_text(text).state == "unreadable"


def test_an_image_without_objects_is_a_sound_answer() -> None:
    """Nothing was seen, and that was said properly."""
    assert read_text('{"image_1":{}}') == Reading((), "sound")


def test_a_key_that_comes_twice_is_no_broken_object() -> None:
    """Both are read; one that is broken beside them is counted."""
    twice = '"object_1":{"bbox_2d":[10,10,50,50],"desc":"one"},"object_1":{"bbox_2d":[60,60,90,90],"desc":"two"}'
    found = read_text(f'{{"image_1":{{{twice}}}}}')
    assert (found.state, len(found.objects), dict(found.repairs)) == ("sound", 2, {})
    found = read_text(f'{{"image_1":{{{twice},"object_2":{{"desc":"no shape"}}}}}}')
    assert (len(found.objects), dict(found.repairs)) == (2, {BROKEN: 1})


def test_half_a_letter_of_an_answer_can_be_written() -> None:
    """An escape may name it, and no file takes it."""
    (found,) = read_text(r'{"image_1":{"object_1":{"bbox_2d":[10,10,50,50],"desc":"one\ud83d"}}}').objects
    assert found.desc == "one?"

"""The answer: written in reading order, read back exactly, and read back as far as it goes when damaged."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.test_geometry import shapes
from trainer.data.answer import ParsedObject, answer_text, parse_answer
from trainer.data.geometry import EmitNorm, Geometry, bounding_box, emit
from trainer.data.records import Object, Picture, Record
from trainer.data.template import ParsedObject as FromTemplate

DESCS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
NORMS = st.sampled_from(["norm1000", "norm100", "none"])


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A record of one to three images with one to six objects of any shape and any words."""
    width, height = draw(st.integers(17, 4000)), draw(st.integers(17, 4000))
    n_images = draw(st.integers(1, 3))
    objects = st.builds(Object, shapes(width, height), DESCS, st.integers(0, n_images - 1))
    found = tuple(draw(st.lists(objects, min_size=1, max_size=6)))
    return Record("train.jsonl:1", (Picture(Path("a.png"), width, height),) * n_images, found)


def test_the_answer_is_compact_json_in_reading_order() -> None:
    """Worked by hand: lower box second, line from its left end with its number of points before `desc`."""
    record = Record(
        "train.jsonl:1",
        (Picture(Path("a.png"), 200, 100),),
        (
            Object(Geometry("bbox_2d", (20, 50, 60, 80)), "七/红"),
            Object(Geometry("line", (150, 10, 100, 5)), "wire"),
        ),
    )
    assert answer_text(record, "norm1000") == (
        '{"image_1":{"object_1":{"line":[500,50,750,100],"line_points":2,"desc":"wire"},'
        '"object_2":{"bbox_2d":[100,500,300,800],"desc":"七/红"}}}'
    )


def test_objects_go_to_the_group_of_their_image() -> None:
    """Groups are named from 1; an image without objects has an empty group; numbers start anew in each."""
    box = Geometry("bbox_2d", (0, 0, 50, 50))
    images = tuple(Picture(Path(name), 100, 100) for name in ("a.png", "b.png", "c.png"))
    record = Record("r:1", images, (Object(box, "x", 2), Object(box, "y", 0)))
    answer = answer_text(record, "norm100")
    assert {k: list(v) for k, v in json.loads(answer).items()} == {
        "image_1": ["object_1"],
        "image_2": [],
        "image_3": ["object_1"],
    }
    points = (0.0, 0.0, 50.0, 50.0)
    assert parse_answer(answer) == [
        ParsedObject("bbox_2d", points, "y", 0),
        ParsedObject("bbox_2d", points, "x", 2),
    ]
    assert ParsedObject is FromTemplate


@given(records(), NORMS)
def test_parsing_an_answer_gives_the_objects_back(record: Record, norm: EmitNorm) -> None:
    """Kind, emitted points, words and image of every object, whatever the words are."""
    size = record.size
    written = [(o.image, emit(o.geometry, size, norm), o.desc) for o in record.objects]
    read = parse_answer(answer_text(record, norm))
    as_read = sorted((p.image, p.kind, p.points, p.desc) for p in read)
    assert as_read == sorted((image, g.kind, g.points, desc) for image, g, desc in written)
    corners = [(p.image, bounding_box(p.points)[1], bounding_box(p.points)[0]) for p in read]
    assert corners == sorted(corners)


@given(records(), NORMS)
def test_the_answer_does_not_depend_on_the_order_in_the_file(record: Record, norm: EmitNorm) -> None:
    """Objects reversed: the same text."""
    turned = Record("r:1", record.images, record.objects[::-1])
    assert answer_text(record, norm) == answer_text(turned, norm)


@given(records(), st.data())
def test_a_cut_answer_gives_its_complete_objects(record: Record, data: st.DataObject) -> None:
    """Every cut gives a prefix of the objects of the whole; cutting only the closing braces loses none."""
    text = answer_text(record, "norm1000")
    whole = parse_answer(text)
    cut = parse_answer(text[: data.draw(st.integers(0, len(text)))])
    assert cut == whole[: len(cut)]
    if record.objects[-1].image == len(record.images) - 1:
        assert parse_answer(text[:-2]) == whole


@given(st.text())
def test_any_text_is_parsed_without_raising(text: str) -> None:
    """Whatever a model says."""
    assert isinstance(parse_answer(text), list)


@given(records(), st.data())
def test_a_mutated_answer_is_parsed_without_raising(record: Record, data: st.DataObject) -> None:
    """A piece cut out, doubled or replaced by JSON's own letters: what comes back is sound."""
    text = answer_text(record, "norm1000")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    patch = data.draw(st.text('{}[]",:\\0123456789eE-.NaInfity_objctmgd', max_size=12))
    for mutated in (text[:start] + patch + text[end:], text[:end] + text[start:]):
        for found in parse_answer(mutated):
            assert len(found.points) >= 4
            assert all(abs(v) < float("inf") for v in found.points)


def test_unsound_objects_are_left_out_and_the_sound_ones_beside_them_kept() -> None:
    """No, two or wrong shapes, numbers that are none, a missing desc; nesting that would exhaust the stack."""
    sound = '{"bbox_2d":[1,2,3,4],"desc":"a}{"}'
    unsound = [
        *('{"desc":"x"}', '{"bbox_2d":[1,2,3,4],"quad":[1,2,3,4,5,6,7,8],"desc":"x"}'),
        *(
            '{"bbox_2d":[1,2,3],"desc":"x"}',
            '{"bbox_2d":[1,2,3,NaN],"desc":"x"}',
            '{"bbox_2d":[1,2,3,1e999],"desc":"x"}',
        ),
        *('{"bbox_2d":[1,2,3,4]}', '{"bbox_2d":7,"desc":"x"}', '{"bbox_2d":[1,2,3,4],"desc":5}'),
        *('{"bbox_2d":[1,2,3,"a"],"desc":"x"}', '{"bbox_2d":[1,2,3,' + "9" * 5000 + '],"desc":"x"}'),
        *('{"a":' + "[" * 100_000 + "}", "{" * 1000, '{"image_99999999999999999999":'),
    ]
    assert parse_answer(",".join([sound, *unsound, sound])) == [ParsedObject("bbox_2d", (1, 2, 3, 4), "a}{")] * 2

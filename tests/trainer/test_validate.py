"""`trainer validate`: every fault is told, what is suspicious too, numbers are those of the files, and how it ends."""

import io
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tests.running import trainer
from trainer.config.load import load
from trainer.data.packing import Fixed, StepPlan
from trainer.data.statistics import Quantiles, first_epoch, quantiles, tried_limits
from trainer.data.suspicions import CHECKS
from trainer.data_figure import check_out, draw, panels
from trainer.datasets import make_encoder
from trainer.errors import UserError
from trainer.lettering import Lettering
from trainer.model import load_tools
from trainer.show_data import as_tree, show_json, show_table
from trainer.validate import Validation, validate

Lines = list[Any]
Sets = dict[str, Lines]

# name -> (width, height, gray). Merged tokens are 32 pixels wide and high: 6, 4 and 3 in training.
IMAGES = {
    "a.png": (96, 64, 10), "b.png": (64, 64, 20), "c.png": (32, 96, 30),
    "d.png": (96, 64, 40), "e.png": (64, 64, 50), "thin.png": (640, 3, 60),
    "wide.png": (400, 64, 70),
}  # fmt: skip


def box(desc: str, *corners: float) -> dict[str, Any]:
    """An object with a box."""
    return {"bbox_2d": list(corners or (4, 4, 24, 28)), "desc": desc}


def record(image: str, *objects: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A line that shows one image, with its size."""
    width, height, _ = IMAGES[image]
    return {"images": [image], "width": width, "height": height, "objects": list(objects), **more}


CARS = (box("汽车/red", 1, 1, 9, 9), box("汽车/blue", 10, 10, 20, 90), box("汽车", 2, 30, 8, 60))
SOUND: Sets = {
    "train": [
        record("a.png", box("汽车/red"), box("truck", 30, 4, 90, 60), summary="two", domain="street"),
        record("b.png", {"line": [0, 9, 60, 9], "desc": "kerb"}, domain="street"),
        record("c.png", *CARS, weight=2),
    ],
    "val": [record("d.png", box("truck/red"), domain="street")],
    "ood": [record("e.png", box("boat"), domain="sea")],
}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Validation]:
    """Writes sets with all images into a folder and validates them; `__` stands for the dot of a key."""

    def write_and_check(sets: Sets, **overrides: str) -> Validation:
        return validate(load("last6_lora", overrides=written(tmp_path, sets) | keys(overrides)))

    return write_and_check


def keys(overrides: dict[str, str]) -> dict[str, str]:
    """Names of arguments as keys of the configuration."""
    return {key.replace("__", "."): value for key, value in overrides.items()}


def written(folder: Path, sets: Sets) -> dict[str, str]:
    """Sets as JSONL files, texts as they are, and the settings that name them."""
    for name, (width, height, gray) in IMAGES.items():
        Image.new("L", (width, height), gray).save(folder / name)
    for name, lines in sets.items():
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {f"custom.{name}_jsonl": str(folder / f"{name}.jsonl") for name in sets}


def changed(change: Callable[[Sets], object]) -> Sets:
    """The sound sets with something done to them."""
    sets = deepcopy(SOUND)
    change(sets)
    return sets


def table(found: Validation) -> str:
    """What is printed for people."""
    text = io.StringIO()
    show_table(found, Console(file=text, width=200, highlight=False))
    return text.getvalue()


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_sound_data_set_has_no_error_and_no_warning(check: Callable[..., Validation]) -> None:
    """And says so; records with a summary, a weight, without a domain are as good as others."""
    found = check(SOUND)
    assert (found.errors, found.warnings) == ((), ())
    assert "sound: training would refuse nothing" in table(found) and "warnings" not in table(found)


def test_everything_that_is_wrong_is_told_at_once(check: Callable[..., Validation]) -> None:
    """Of all three files; too long with tokens and limit, too thin with its size; the rest is counted all the same."""
    long = record("b.png", *[box(f"汽车/{number}") for number in range(60)])
    sets = changed(lambda sets: [
        sets["train"].extend(["{", long, record("a.png", box("汽车", 4, 4, 4, 9), {"desc": ""})]),
        sets["val"].append(record("thin.png", box("truck", 1, 1, 9, 3))),
        sets["ood"].extend([record("a.png", box("boat")) | {"images": ["gone.png"]}, 7]),
    ])  # fmt: skip
    found = check(sets)
    train, val, ood = (str(error) for error in found.errors)
    assert "train.jsonl\n  got:     3 bad of 6 records:" in train
    assert "train.jsonl:4: broken JSON" in train
    tokens = found.sets["train"].measured[3].tokens.whole
    assert tokens > 1408 and f"train.jsonl:5: {tokens} tokens, more than 1408" in train
    assert "train.jsonl:6, object 1: bbox_2d [4, 4, 4, 9] is empty" in train and "train.jsonl:6, object 2: " in train
    assert "1 bad of 2 records" in val and "val.jsonl:2: image of 640x3 pixels is too thin" in val
    assert "2 bad of 3 records" in ood and "gone.png: no such file" in ood and "ood.jsonl:3: not a JSON object" in ood
    assert [found.statistics[name].records for name in SOUND] == [4, 1, 1]  # what is only too long has its numbers
    assert [len(found.sets[name].records) for name in SOUND] == [3, 1, 1]
    assert found.statistics["train"].too_long == 1
    assert "cut_answers" not in {warning.check for warning in found.warnings}  # it is refused, not cut
    assert "sound" not in table(found)


def test_beyond_twenty_faults_are_counted(check: Callable[..., Validation]) -> None:
    """In the message; the JSON has them all."""
    found = check(SOUND | {"val": [*SOUND["val"], *["{"] * 25]})
    (error,) = found.errors
    assert error.got.startswith("25 bad of 26 records:") and error.got.count("broken JSON") == 20
    assert error.got.endswith("... and 5 more")
    assert len(as_tree(found)["sets"]["val"]["bad"]) == 25


def test_bad_records_that_are_skipped_are_warnings(check: Callable[..., Validation]) -> None:
    """Except where none is left: that would be refused all the same."""
    skip = {"custom__on_bad_record": "skip"}
    found = check(changed(lambda sets: sets["train"].extend(["{", "7"])), **skip)
    (warning,) = found.warnings
    assert found.errors == () and warning.text.endswith("(custom.on_bad_record: skip): 2")
    assert [place.split(": ")[0] for place in warning.places] == ["train.jsonl:4", "train.jsonl:5"]
    found = check(SOUND | {"train": ["{"]}, **skip)
    assert [error.got.splitlines()[0] for error in found.errors] == ["1 bad of 1 records:"]
    assert (found.epoch, found.warnings) == (None, ())


def test_a_misspelt_key_that_may_be_left_out_is_a_warning(check: Callable[..., Validation]) -> None:
    """It has no effect, in a record or in an object; keys of the user's own are nobody's business."""
    found = check(changed(lambda sets: [
        *(each.update(domian="street", camera=7) for each in sets["train"][:2]),
        sets["train"][1]["objects"][0].update(imge=0, track="x"),
    ]))  # fmt: skip
    (warning,) = (warning for warning in found.warnings if warning.check == "misspelt_keys")
    told = ["train.jsonl:1: 'domian', in 2 records; domain?", "train.jsonl:2: 'imge', in 1 record; image?"]
    assert found.errors == () and sorted(warning.places) == told


def test_a_file_without_a_record_does_not_hide_the_faults_of_the_others(check: Callable[..., Validation]) -> None:
    """Each is told; the numbers are those of what could be read."""
    found = check(SOUND | {"train": [], "val": ["{", *SOUND["val"]]})
    assert [error.got.splitlines()[0] for error in found.errors] == ["no record in the file", "1 bad of 2 records:"]
    assert [*found.statistics] == ["val", "ood"] and "boat" in table(found)


def test_summaries_that_are_to_be_trained_must_be_there(check: Callable[..., Validation]) -> None:
    """As when training starts."""
    without = changed(lambda sets: sets["train"][0].pop("summary"))
    assert check(SOUND, custom__summary_ratio="0.5").errors == ()
    (error,) = check(without, custom__summary_ratio="0.5").errors
    assert "has a summary" in error.got


def test_weights_that_draw_nothing_in_the_first_epoch_are_an_error(check: Callable[..., Validation]) -> None:
    """Training refuses them too; there is no first epoch to count then."""
    found = check(changed(lambda sets: [each.update(weight=0.01) for each in sets["train"]]))
    (error,) = found.errors
    assert "no sample in the first epoch: 3 records with weights of 0.03 in all" in str(error)
    assert found.epoch is None and "first epoch:" not in table(found)
    assert as_tree(found)["first_epoch"] is None


def test_a_summary_that_makes_its_sample_too_long_is_found(check: Callable[..., Validation]) -> None:
    """Where a record can be drawn with it; training would refuse it."""
    long = {"train": [record("a.png", box("汽车/red"), summary="two cars " * 2000)], "val": SOUND["val"]}
    assert check(long).errors == ()
    (error,) = check(long, custom__summary_ratio="0.5").errors
    assert "train.jsonl:1" in str(error)


def test_lengths_are_those_of_the_longest_answer_that_can_be_drawn(check: Callable[..., Validation]) -> None:
    """A summary counts where one is drawn, in the numbers and in the warning of what is cut."""
    long = changed(lambda sets: sets["train"][0].update(summary="two cars " * 2000))
    cut = {"template__truncation_strategy": "right"}
    found = check(long, **cut)
    assert (found.statistics["train"].too_long, found.warnings) == (0, ())
    found = check(long, **cut, custom__summary_ratio="0.5")
    (warning,) = [each for each in found.warnings if each.check == "cut_answers"]
    (place,) = warning.places
    tokens = found.statistics["train"].spreads["tokens"]
    assert found.statistics["train"].too_long == 1 and tokens is not None
    assert place == f"train.jsonl:1: {tokens.max} tokens; the summary is cut"


# --- what is suspicious -------------------------------------------------------------------------------------------


def two_images(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """A record that shows a.png and d.png."""
    return record("a.png", *objects, domain="street") | {"images": ["a.png", "d.png"]}


PLANTED: dict[str, tuple[Callable[[Sets], object], dict[str, str], list[str]]] = {
    "shared_images": (
        lambda sets: sets["val"].append(record("b.png", box("truck"), domain="street")),
        {},
        ["val.jsonl:2: ", "b.png is that of train.jsonl:2"],
    ),
    "duplicate_records": (
        lambda sets: sets["train"].append({**sets["train"][2], "weight": 1, "objects": [*reversed(CARS)]}),
        {},
        ["train.jsonl:4: equal to train.jsonl:3"],
    ),
    "contradictions": (
        lambda sets: sets["train"].append(record("c.png", box("truck", 1, 1, 9, 9))),
        {},
        ["train.jsonl:4: ", "c.png has other objects than in train.jsonl:3"],
    ),
    "unseen_types": (
        lambda sets: sets["val"][0]["objects"].append(box("bus/red")),
        {},
        ["val.jsonl:1: 'bus', 1 in val"],
    ),
    "unseen_domains": (lambda sets: sets["val"][0].update(domain="night"), {}, ["val.jsonl:1: 'night'"]),
    "spellings": (
        lambda sets: sets["train"][1]["objects"].extend([box("Ｔｒｕｃｋ"), box("truck "), box("truck／red")]),
        {},
        ["'truck' (2)", "'Ｔｒｕｃｋ' (1)", "'truck ' (1)", "'truck／red' (1)"],
    ),
    "no_area": (
        lambda sets: sets["train"][0]["objects"].append(box("truck", 5, 5, 5.9, 50)),
        {},
        ["train.jsonl:1, object 3: 'truck' is less than a pixel as the model is shown it"],
    ),
    "empty_images": (
        lambda sets: sets.update(train=[two_images([box("汽车"), box("truck")]), *sets["train"][1:]], val=[
            record("e.png", box("truck"), domain="street")], ood=[record("d.png", box("boat"))]),
        {},
        ["train.jsonl:1: image 2, ", "d.png"],
    ),
    "cut_answers": (
        lambda sets: sets["train"][1]["objects"].extend([box(f"kerb/{number}") for number in range(60)]),
        {"template__truncation_strategy": "right"},
        ["train.jsonl:2: ", "; whole objects left: ", " of 61"],
    ),
}  # fmt: skip


def test_every_check_is_planted_once() -> None:
    """A new check needs a row above."""
    assert set(PLANTED) == set(CHECKS)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_suspicious_is_told(check: Callable[..., Validation], name: str) -> None:
    """With its place; it is no error, and no other check takes it for its own."""
    change, overrides, words = PLANTED[name]
    found = check(changed(change), **overrides)
    told = [warning for warning in found.warnings if warning.check == name]
    (warning,) = [warning for warning in told if name != "empty_images" or "train" in warning.text]
    (place,) = warning.places
    assert warning.text.endswith(": 1")
    for word in words:
        assert word in place, place
    assert found.errors == ()
    others = {warning.check for warning in found.warnings} - {name}
    assert others <= ({"shared_images"} if name == "empty_images" else set())
    assert f"{warning.text}\n    {place}\n" in table(found)


def test_an_image_under_another_name_is_the_same_image(check: Callable[..., Validation], tmp_path: Path) -> None:
    """Contents decide: a copy of a training image in validation, and out of domain."""
    (tmp_path / "copies").mkdir()
    for number in (1, 2):
        Image.new("L", (64, 64), 20).save(tmp_path / "copies" / f"{number}.png")  # as b.png
    sets = changed(lambda sets: [
        sets["val"].append(record("b.png", box("truck")) | {"images": ["copies/1.png"]}),
        sets["ood"].append(record("b.png", box("boat")) | {"images": ["copies/2.png"]}),
    ])  # fmt: skip
    val, ood = check(sets).warnings
    assert val.text == "images of val that are in train too: 1" and ood.text.startswith("images of ood")
    assert "copies/1.png is that of train.jsonl:2, " in val.places[0] and "b.png" in val.places[0]


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (box("truck", 5, 5, 7, 7), False),
        (box("truck", 5, 5, 5.99, 7), True),
        ({"line": [5, 5, 5.5, 5.5], "desc": "truck"}, True),
        ({"line": [5, 5, 9, 5], "desc": "truck"}, False),
        ({"poly": [5, 5, 30, 30, 30.01, 30], "desc": "truck"}, True),
        ({"quad": [5, 5, 30, 30, 30, 5, 5, 30], "desc": "truck"}, False),
    ],
)
def test_nearly_no_area(check: Callable[..., Validation], thing: dict[str, Any], told: bool) -> None:
    """Under a pixel wide, high or large, a line by its length; a quad whose corners go crosswise can be seen."""
    found = check(changed(lambda sets: sets["train"][0]["objects"].append(thing)))
    assert [warning.check for warning in found.warnings] == ["no_area"] * told


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"custom__emit_norm": "norm1000"}, None),
        ({"custom__emit_norm": "norm100"}, "flat in the coordinates of the answer (custom.emit_norm: norm100)"),
        ({"custom__emit_norm": "norm1000", "template__max_pixels": "6400"}, "less than a pixel as the model is shown"),
    ],
)
def test_area_is_that_of_the_answer_and_of_the_image_as_shown(
    check: Callable[..., Validation], overrides: dict[str, str], told: str | None
) -> None:
    """1.6 of 400 pixels: 21 to 25 thousandths, 2 to 2 hundredths, and 0.8 pixels where the image is halved."""
    sets = changed(lambda sets: sets["train"].append(record("wide.png", box("truck", 8.2, 5, 9.8, 50))))
    places = [place for warning in check(sets, **overrides).warnings for place in warning.places]
    assert [told in place for place in places] == ([True] if told else []), places


# --- numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_files(check: Callable[..., Validation]) -> None:
    """Worked by hand; each quantile is a value that occurs, and of three values 90 % means all."""
    train = check(SOUND).statistics["train"]
    assert (train.records, train.images, train.image_files, train.objects) == (3, 3, 3, 6)
    assert (train.summaries, train.weighted, train.too_long) == (1, 1, 0)
    assert train.kinds == {"bbox_2d": 5, "line": 1}
    assert train.types == {"汽车": 4, "truck": 1, "kerb": 1}
    assert train.domains == {"street": 2}
    assert train.spreads["image_width"] == Quantiles(32, 64, 96, 96, 96)
    assert train.spreads["image_height"] == Quantiles(64, 64, 96, 96, 96)
    assert train.spreads["image_megapixels"] == Quantiles(0.003072, 0.004096, 0.006144, 0.006144, 0.006144)
    assert train.spreads["weight"] == Quantiles(1, 1, 2, 2, 2)
    assert train.spreads["objects"] == Quantiles(1, 2, 3, 3, 3)
    assert train.spreads["image_tokens"] == Quantiles(3, 4, 6, 6, 6)


def test_token_lengths_are_those_of_encoded_samples(check: Callable[..., Validation]) -> None:
    """Prompt, image and answer add up to what training will see, pixels and all."""
    found = check(SOUND)
    config = found.resolved.config
    encoder = make_encoder(config, load_tools("pocket"), None)
    for measured in found.sets["train"].measured:
        sample, tokens = encoder.encode(measured.record), measured.tokens
        assert tokens.whole == len(sample.input_ids)
        assert (tokens.image, tokens.answer) == (int(sample.image_tokens.sum()), int(sample.supervised.sum()))


def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    """Nothing in between: 90 of 100 records have at most p90 tokens."""
    assert quantiles(range(100, 0, -1)) == Quantiles(1, 50, 90, 99, 100)
    assert quantiles([7]) == Quantiles(7, 7, 7, 7, 7)
    assert quantiles([]) is None


def test_other_limits_are_tried_from_half_of_the_records_to_all_of_them() -> None:
    """And the one that is set. A pack of 512 has 100 + 300 tokens, one of 1,000 all three."""
    tried = {limit.tokens: limit for limit in tried_limits({"train": [300, 600, 100], "val": [5000]}, 1000, seed=3)}
    assert [*tried] == [512, 1000, 1024, 2048, 4096, 8192]
    assert tried[512].too_long == {"train": 1, "val": 1} and tried[8192].too_long == {"train": 0, "val": 0}
    assert (tried[512].packs, tried[512].fill) == (1, 400 / 512)
    assert (tried[1000].packs, tried[1000].fill) == (1, 1.0)
    assert tried_limits({}, 1000, seed=3) == []


def test_the_first_epoch_is_that_of_the_plan(check: Callable[..., Validation]) -> None:
    """Packed or not; the record of weight 2 comes twice."""
    plan = StepPlan(Fixed((60, 50, 40, 30)), seed=1, micro_batch=1, accumulation=2, capacity=200)
    epoch = first_epoch(plan)
    assert (epoch.samples, epoch.tokens, epoch.packs, epoch.steps, epoch.fill) == (4, 180, 1, 1, 0.9)
    found = check(SOUND, training__packing="false")
    first, second, third = (measured.tokens.whole for measured in found.sets["train"].measured)
    assert found.epoch and (found.epoch.samples, found.epoch.packs, found.epoch.fill) == (4, 4, None)
    assert found.epoch.tokens == first + second + 2 * third


def test_a_part_of_the_records_is_counted_where_only_a_part_is_trained(check: Callable[..., Validation]) -> None:
    """`custom.max_records`; faults are those of the whole file."""
    found = check(changed(lambda sets: sets["train"].append("{")), custom__max_records="2")
    assert (found.sets["train"].n_records, found.statistics["train"].records) == (4, 2)
    assert len(found.errors) == 1


# --- how it is told -----------------------------------------------------------------------------------------------


def test_the_tables_hold_the_numbers(check: Callable[..., Validation]) -> None:
    """Types with their shares side by side, one row where all sets are alike, rare types counted together."""
    rows = [line.split() for line in table(check(SOUND)).splitlines()]
    assert ["汽车", "4", "66.7", "0", "0.0", "0", "0.0"] in rows
    assert ["street", "2", "66.7", "1", "100.0", "0", "0.0"] in rows
    assert ["none", "1", "33.3", "0", "0.0", "0", "0.0"] in rows
    assert ["tokens,", "images", "train", "3", "4", "6", "6", "6"] in rows
    assert ["weight", "train", "1", "1", "2", "2", "2"] in rows
    assert any(row[:3] == ["tokens,", "prompt", "all"] for row in rows)
    many = changed(lambda sets: sets["train"][0]["objects"].extend(box(f"type {number}") for number in range(20)))
    assert any(line.startswith("9 more ") for line in table(check(many)).splitlines())


def test_names_cannot_move_the_cursor(check: Callable[..., Validation]) -> None:
    """Neither markup nor control characters of the data reach the terminal."""
    text = table(check(changed(lambda sets: sets["train"][0]["objects"].append(box("\x1b[2J[red]")))))
    assert "\x1b" not in text and "\\x1b[2J[red]" in text


def test_json_is_one_object_with_everything(
    check: Callable[..., Validation], capsys: pytest.CaptureFixture[str]
) -> None:
    """All counts, all places; nothing else on standard output."""
    found = check(changed(lambda sets: sets["val"].extend([record("b.png", box("truck")), "{"])))
    show_json(found)
    tree = json.loads(capsys.readouterr().out)
    assert tree["sound"] is False
    assert [error["got"].splitlines()[0] for error in tree["errors"]] == ["1 bad of 3 records:"]
    assert tree["sets"]["val"]["bad"].keys() == {"val.jsonl:3"}
    assert tree["sets"]["train"]["types"] == {"汽车": 4, "truck": 1, "kerb": 1}
    assert tree["sets"]["train"]["spreads"]["objects"] == {"min": 1, "median": 2, "p90": 3, "p99": 3, "max": 3}
    assert [warning["check"] for warning in tree["warnings"]] == ["shared_images"]
    assert tree["first_epoch"]["packs"] == 1


def test_the_picture_shows_what_the_table_says(check: Callable[..., Validation], tmp_path: Path) -> None:
    """Lengths with the limit, objects, types side by side with their names, sizes; written as a file of its kind."""
    found = check(SOUND, global_max_length="250")
    letters = Lettering(["汽车"])
    tokens, objects, types, sizes = panels(found, letters).axes
    assert letters.missing == ""
    assert "limit 250" in [text.get_text() for text in tokens.texts]
    assert [label.get_text() for label in types.get_yticklabels()] == ["汽车", "truck", "kerb", "boat"]
    train, val, _ = ([round(bar.get_width(), 1) for bar in bars] for bars in types.containers)
    assert (train, val) == ([66.7, 16.7, 16.7, 0.0], [0.0, 100.0, 0.0, 0.0])
    (shares, edges, _), *_ = (stairs.get_data() for stairs in objects.patches)
    assert [round(share, 1) for share in shares] == [33.3, 33.3, 33.3] and [*edges] == [0.5, 1.5, 2.5, 3.5]
    assert sorted(map(tuple, sizes.collections[0].get_offsets().tolist())) == [(32, 96), (64, 64), (96, 64)]
    draw(found, tmp_path / "new" / "data.png")
    with Image.open(tmp_path / "new" / "data.png") as picture:
        assert picture.size == (1650, 1140)


@pytest.mark.parametrize("out", ["data.jpgg", "data", "taken.png"])
def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path: Path, out: str) -> None:
    """Before anything is read for it."""
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UserError, match="--out"):
        check_out(tmp_path / out)


def test_the_exit_status_says_whether_training_would_refuse_it(tmp_path: Path) -> None:
    """Bad: 2, numbers on standard output, what is wrong on standard error, as one message a file. Sound: 0."""
    bad = changed(lambda sets: [sets["train"].append("{"), sets["ood"].append("{")])
    flags = [part for key, value in written(tmp_path, bad).items() for part in (f"--{key}", value)]
    done = trainer("validate", "last6_lora", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr and "train.jsonl:4: " in done.stderr
    assert "data set" in done.stdout and "train.jsonl:4" not in done.stdout
    done = trainer("validate", "last6_lora", *flags, "--out", "train.jsonl/data.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error: ") == 3 and "error: --out\n" in done.stderr
    written(tmp_path, SOUND)
    done = trainer("validate", "last6_lora", *flags, "--format", "json", "--out", "data.svg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["sound"] is True and (tmp_path / "data.svg").is_file()

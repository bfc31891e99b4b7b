"""Subsets spread over a file, and evaluation sets that are the same packed and padded, whole and shared by ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import PAD_ID, MakeParts, tiny_samples
from trainer.build import prepare
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.data.augment import Chain, Rules, Step
from trainer.data.digits import ensure_digits
from trainer.data.exchange import exchange_images
from trainer.data.loader import SampleCache, SampleSet
from trainer.data.records import Record
from trainer.datasets import (
    chain_from,
    check_lengths,
    eval_sets_from,
    exchanged_batches,
    make_encoder,
    mix_from,
    read_data,
    spread,
    to_caption,
    unknown_mark,
    unused_taxonomy,
)
from trainer.errors import DataError
from trainer.events import EVAL, EXCHANGED
from trainer.loop import evaluate
from trainer.model import load_tools


def records(count: int) -> tuple[Record, ...]:
    """Records r0, r1 ..., sorted by domain as files of users often are."""
    return tuple(Record(f"r{i}", (), (), domain="ab"[i * 2 // count]) for i in range(count))


@pytest.mark.parametrize(
    ("count", "expected"), [(4, ["r0", "r2", "r5", "r7"]), (1, ["r0"]), (0, []), (99, 10), (None, 10)]
)
def test_a_subset_is_spread_over_the_file(count: int | None, expected: list[str] | int) -> None:
    """Of ten records, so that a file sorted by domain gives of each; null and too many give all."""
    chosen = [record.id for record in spread(records(10), count)]
    assert chosen == (expected if isinstance(expected, list) else [f"r{i}" for i in range(10)])


@pytest.mark.parametrize(("scheme", "lines"), [("A", 1), ("B", 0)])
def test_a_taxonomy_that_is_not_quoted_is_told(scheme: str, lines: int, tmp_path: Path) -> None:
    """Scheme A has no place for it."""
    (tmp_path / "t.yaml").write_text("types: [car]\n")
    changes = {"custom.taxonomy": str(tmp_path / "t.yaml"), "prompts.scheme": scheme}
    config = load("last6_lora", overrides=changes).config
    assert len(unused_taxonomy(config)) == lines


@pytest.mark.parametrize("capacity", [None, 30])
@pytest.mark.parametrize("ranks", [1, 2])
def test_exchanged_images_cost_the_same_in_any_batches(make_parts: MakeParts, capacity: int | None, ranks: int) -> None:
    """Six records of two grids: each record's loss, whatever shares its batch, its pack or its rank."""
    exchanged = exchange_images(tiny_samples((7, 12, 20, 9, 8, 11), grids=[(2, 4), (4, 4)]))
    engine = make_parts().engine
    single = evaluate(engine, exchanged_batches(exchanged, PAD_ID, batch_size=1, capacity=None))
    batches = exchanged_batches(exchanged, PAD_ID, batch_size=2, capacity=capacity)
    shares = [evaluate(engine, batches[rank::ranks]) for rank in range(ranks)]
    found = {i: loss for share in shares for i, loss in zip(share.record_ids, share.loss_sums, strict=True)}
    assert found == pytest.approx(dict(zip(single.record_ids, single.loss_sums, strict=True)), rel=1e-5)


def test_images_outside_a_files_folder_are_read_only_where_the_configuration_allows_it(tmp_path: Path) -> None:
    """`custom.allow_outside_root` reaches every file."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    objects = [{"bbox_2d": [1, 1, 9, 9], "desc": "a"}]
    record = {"images": ["../a.png"], "width": 32, "height": 32, "objects": objects}
    files = {f"{name}_jsonl": tmp_path / "data" / f"{name}.jsonl" for name in ("train", "val", "ood")}
    (tmp_path / "data").mkdir()
    for path in files.values():
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    custom: dict[str, Any] = {name: str(path) for name, path in files.items()}
    with pytest.raises(DataError, match=r"custom\.allow_outside_root: true"):
        read_data(Config.model_validate({"custom": custom}))
    data = read_data(Config.model_validate({"custom": custom | {"allow_outside_root": True}}))
    assert [len(found.records) for found in data.sets().values()] == [1, 1, 1]


def test_nothing_that_is_measured_is_augmented_whatever_training_does(tmp_path: Path) -> None:
    """Eval, probe, out-of-domain and exchanged batches, and what is captioned: bit for bit as without augmentation."""
    paths = ensure_digits(tmp_path, seed=17, n_train=4, n_val=4, n_ood=4)
    custom = {"train_jsonl": str(paths.train), "val_jsonl": str(paths.val), "ood_jsonl": str(paths.ood)}
    ops = [{"name": name, "params": {"prob": 1.0}} for name in ("hflip", "random_crop", "gamma")]
    measured = []
    for mode in ("off", "clean", "published_noisy"):
        own = custom | {"augmentation": {"mode": mode, "ops": ops}}
        config = Config.model_validate({"model": {"model": "pocket"}, "prompts": {"language": "en"}, "custom": own})
        encoder = make_encoder(config, load_tools("pocket"), None)
        data = check_lengths(config, read_data(config), encoder)
        cache = SampleCache()
        training = SampleSet(data.train.records, encoder, mix_from(config, training=True), cache=cache)
        shown = [training[0, place].pixel_values for place in range(4)]  # first, so that a shared cache would show it
        sets = eval_sets_from(config, data, encoder, cache, rank=0, ranks=1)
        batches = {name: [batch.model_inputs() for batch in each.batches()] for name, each in sets.items()}
        measured.append((shown, batches, to_caption(config, data, encoder)))
    (plain, expected, captioned), *augmented = measured
    assert {"eval", "probe", "ood"} < {*expected}
    for shown, batches, captions in augmented:
        assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(shown, plain, strict=True))
        assert captions == captioned
        assert batches.keys() == expected.keys()
        for name, of_set in batches.items():
            for batch, other in zip(of_set, expected[name], strict=True):
                assert all(torch.equal(value, other[key]) for key, value in batch.items()), name


def test_weights_that_leave_an_epoch_empty_are_refused(tmp_path: Path) -> None:
    """A run of no steps, or none at first, is nothing that anybody means: said before anything starts."""
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    record = {"images": ["a.png"], "width": 96, "height": 96, "objects": [{"bbox_2d": [1, 1, 50, 50], "desc": "a"}]}
    for weight, good in ((0.001, False), (1, True)):
        path = tmp_path / f"{weight}.jsonl"
        path.write_text(json.dumps(record | {"weight": weight}) + "\n", encoding="utf-8")
        files = {"train_jsonl": str(path), "val_jsonl": str(path)}
        resolved = load("last6_lora", overrides=files)
        if good:
            assert prepare(resolved).budget.total_steps == 4
            continue
        with pytest.raises(DataError, match=r"0\.001\.jsonl(.|\n)*weights of 0\.001 in all"):
            prepare(resolved)


def test_the_chain_is_the_configured_one() -> None:
    """Operations in order with their parameters, the bounds at an edge, the words, and the fault of published runs."""
    settings: dict[str, Any] = {"min_coverage": 0.4, "completeness_threshold": 0.8, "turned_boxes": "bbox_2d"}
    settings |= {"bypass_prob": 0.25, "complete_word": "whole"}
    ops = [{"name": "rotate", "params": {"max_deg": 5.0, "prob": 0.3}}, {"name": "pad_to_multiple"}]
    for mode, keeps in (("clean", False), ("published_noisy", True)):
        augmentation = settings | {"mode": mode, "ops": ops}
        chain = chain_from(
            Config.model_validate({"prompts": {"language": "zh"}, "custom": {"augmentation": augmentation}})
        )
        assert chain == Chain(
            (Step("rotate", 0.3, {"max_deg": 5.0}), Step("pad_to_multiple", 1.0, {"multiple": 32})),
            Rules(0.4, 0.8, "whole", "部分可见", "bbox_2d", keeps),
            seed=17,
            bypass_prob=0.25,
        )
    assert chain_from(Config.model_validate({"custom": {"augmentation": {"mode": "off", "ops": ops}}})) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"custom.augmentation.mode": "clean", "custom.augmentation.partial_word": "null"}, True),
        ({"custom.augmentation.mode": "clean", "custom.augmentation.partial_word": ""}, False),
        ({"custom.augmentation.mode": "clean", "custom.augmentation.partial_word": "large"}, False),
        ({"custom.augmentation.mode": "published_noisy", "custom.augmentation.partial_word": "null"}, False),
        ({}, False),
    ],
)
def test_a_mark_that_no_record_has_is_told(changes: dict[str, str], told: bool) -> None:
    """It is in no validation answer either; whoever chose a word, or none, is not told."""
    config = load("last6_lora", overrides={"custom.digits.train": "8", "custom.digits.val": "4"} | changes).config
    assert bool(unknown_mark(config, read_data(config))) is told


@pytest.mark.parametrize("per_turn", ["1", "2", "3"])
def test_what_is_evaluated_with_exchanged_images_is_evaluated_with_its_own_too(per_turn: str) -> None:
    """Of several records in a turn as well: the gain is a difference, sample by sample."""
    changes = {"custom.digits.train": "8", "custom.digits.val": "20", "tracking.vision_gain_records": "5"}
    config = load("last6_lora", overrides=changes | {"custom.images_per_user_turn": per_turn}).config
    data = read_data(config)
    encoder = make_encoder(config, load_tools("pocket"), data.taxonomy)
    sets = eval_sets_from(config, data, encoder, SampleCache(), rank=0, ranks=1)
    own, exchanged = ({name for batch in sets[key].batches() for name in batch.record_ids} for key in (EVAL, EXCHANGED))
    assert exchanged and exchanged <= own

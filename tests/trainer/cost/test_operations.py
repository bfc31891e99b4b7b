"""Operations by hand, and the count that was recorded with the steps of the H200."""

import json

import pytest

from benchmarks.scaling import RESULTS, anatomy, samples
from trainer.cost.memory import Again
from trainer.cost.microbatch import MicroBatch
from trainer.cost.operations import Where, operations_of, total
from trainer.strategy import Part

ONE = MicroBatch((100,), (64,), 30)


def test_the_recorded_count_of_the_4b_is_the_same() -> None:
    """`gpu_model.useful_flops` counts from names and shapes in another way."""
    recorded = json.loads((RESULTS / "performance" / "gpu_last6_lora.json").read_text())["useful_gflop_a_sample"]
    found = total(operations_of(anatomy("random:4b", "last6_lora"), samples(1), {}))
    assert found.forward == pytest.approx(1e9 * recorded["forward"], rel=1e-9)
    assert found.inputs + found.weights == pytest.approx(1e9 * recorded["backward"], rel=1e-9)


def test_a_layer_by_hand() -> None:
    """The pocket's language model: 36 layers of width 96, four heads and two key heads of 32, an MLP of 176."""
    found = operations_of(anatomy("pocket", "frozen_vision"), ONE, {})[Where.LLM]
    weights = 96 * (4 + 2 * 2) * 32 + 4 * 32 * 96 + 96 * 2 * 176 + 176 * 96
    adapters = 2 * 16 * ((96 + 128) + 2 * (96 + 64) + (128 + 96) + 3 * (96 + 176))  # of the last two layers
    attention = 36 * 4 * (100 * 100 / 2) * (4 * 32)
    assert found.forward == 2 * 100 * (36 * weights + adapters) + attention
    assert found.inputs == 2 * 100 * (36 * weights + adapters) + 2 * attention
    assert found.weights == 2 * 100 * adapters


def test_training_in_full_takes_twice_the_forward_pass_backward() -> None:
    """6 N a token in all: the aligner under `all_full`, where everything before it trains too."""
    found = operations_of(anatomy("pocket", "all_full"), ONE, {})[Where.ALIGNER]
    assert found.inputs == found.weights == found.forward > 0
    frozen = operations_of(anatomy("pocket", "frozen_vision"), ONE, {})[Where.ALIGNER]
    assert frozen.weights == frozen.forward and frozen.inputs < frozen.forward, "nothing before it needs a gradient"


def test_a_frozen_beginning_has_no_backward_pass_and_an_evaluation_none_at_all() -> None:
    """Nor is anything of it made again."""
    of = anatomy("pocket", "last6_lora")
    found = operations_of(of, ONE, {})
    assert found[Where.FROZEN_VISION].done == found[Where.FROZEN_VISION].forward > 0
    evaluation = total(operations_of(of, ONE, {}, training=False))
    assert evaluation.done == evaluation.forward == total(found).forward


def test_what_runs_forward_again_is_work_and_not_useful() -> None:
    """A checkpointed layer makes all but its last product again, or one product where there was room."""
    of = anatomy("pocket", "frozen_vision")
    layer = of.text.layers[0]
    bare = operations_of(of, ONE, {})[Where.LLM]
    wide = operations_of(of, ONE, {(Part.LLM, 0): Again.WIDE})[Where.LLM]
    whole = operations_of(of, ONE, {(Part.LLM, 0): Again.ALL})[Where.LLM]
    assert bare.useful == wide.useful == whole.useful
    assert wide.again - bare.again == 2 * 100 * layer.up.size
    without_last = layer.qkv.size + layer.out.size + layer.up.size
    assert whole.again - bare.again == 2 * 100 * without_last + 4 * 100 * 100 / 2 * of.text.attended


def test_shared_words_are_computed_once_and_seen_by_all() -> None:
    """Pairs of rows that see each other: causal, within samples, and to the words."""
    batch = MicroBatch((100, 60), (64, 64), 30, shared=20)
    assert (batch.rows(words=False), batch.rows(words=True)) == (120, 140)
    assert batch.pairs(words=False) == 80 * 80 / 2 + 80 * 20 + 40 * 40 / 2 + 40 * 20
    assert batch.pairs(words=True) == batch.pairs(words=False) + 20 * 20 / 2

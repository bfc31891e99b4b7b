"""The cost model at a configuration's own samples, and how `plan` prints it."""

import re

import pytest
import torch

from trainer import build
from trainer.config.load import load
from trainer.cost.duration import CARDS
from trainer.cost.memory import Again
from trainer.cost.operations import Where, total
from trainer.estimate import Estimate, Time, estimate
from trainer.show_cost import cost_lines

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is told on a machine without a GPU")

FEW = {"custom.digits.train": "40", "custom.digits.val": "2", "custom.digits.ood": "2", "launch.nproc": "1"}


def estimated(arm: str = "last6_lora", **overrides: str) -> Estimate:
    """Of a configuration on 40 scenes."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    resolved = load(arm, overrides={**FEW, **keys})
    return estimate(resolved, build.prepare(resolved))


@pytest.fixture(scope="module")
def on_pocket() -> Estimate:
    """Of `last6_lora`."""
    return estimated(training__output_dir="/nowhere/at/all")


def test_the_largest_micro_batch_is_one_of_the_run(on_pocket: Estimate) -> None:
    """A pack of digits: 36 patches each, words shared, and less supervised than all."""
    batch = on_pocket.largest
    assert 1200 < batch.tokens <= 1408 and set(batch.images) == {36}
    assert 8 <= batch.shared < min(batch.lengths)
    assert 0 < batch.supervised < batch.tokens - batch.patches // 4


def test_the_parts_add_up(on_pocket: Estimate) -> None:
    """Memory to its total, and shares of it to a hundred."""
    memory = on_pocket.memory
    assert on_pocket.whole and sum(memory.parts.values()) == memory.total
    lines = list(cost_lines(on_pocket, total_steps=10))
    assert sum(int(share) for share in re.findall(r"B +(\d+) %", "\n".join(lines))) == pytest.approx(100, abs=4)


def test_a_step_computes_its_tokens_once_and_shared_words_once_a_micro_batch(on_pocket: Estimate) -> None:
    """Forty scenes in three steps; two operations a weight and row. Of attention, two parts in seven are forward."""
    batch, llm = on_pocket.largest, on_pocket.operations[Where.LLM]
    rows = 40 / 3 * (batch.tokens / len(batch.lengths) - batch.shared)
    products = 2 * 36 * 87_552 * rows
    assert products < llm.forward - llm.attention * 2 / 7 < 1.3 * products, "adapters and the words themselves beside"
    assert total(on_pocket.operations).done > llm.done


def test_without_an_earlier_run_on_a_cpu_the_time_is_not_known(on_pocket: Estimate) -> None:
    """And `plan` says so."""
    assert on_pocket.time.step_seconds is None and on_pocket.elsewhere is None
    (line,) = [line for line in cost_lines(on_pocket, total_steps=10) if line.startswith("time")]
    assert (
        line == "time             not known: this is a CPU, and no run in /nowhere/at/all has done the same work here"
    )


def test_checkpointing_zero_and_ranks_reach_the_model() -> None:
    """As the configuration has them."""
    given = {"training__gradient_checkpointing": "true", "deepspeed__enabled": "true", "launch__nproc": "2"}
    found = estimated("all_full", **given)
    assert set(found.memory.remade.values()) == {Again.ALL}
    assert found.ranks == 2 and found.memory.moments == found.memory.trained, "two moments, over two ranks"
    assert next(cost_lines(found, total_steps=1)).startswith("memory of each of 2 ranks")


def test_a_run_in_bfloat16_is_told_on_h200s_too() -> None:
    """Of a model that does not fit here: how much a GPU holds, and for how long, from what was measured."""
    keys = {"model__model": "random:4b", "model__torch_dtype": "bfloat16", "launch__nproc": "8"}
    found = estimated(**keys)
    there = found.elsewhere
    assert there is not None and there.card == CARDS[0] and there.ranks == 8
    assert there.time.step_seconds == pytest.approx(sum(there.time.parts.values()))
    assert there.time.parts["exchange"] > 0
    (line,) = [line for line in cost_lines(found, total_steps=100) if line.startswith("on 8 H200")]
    assert "measured on one H200" in line and "several GPUs were not measured" in line


def test_transformers_own_pass_has_no_activations_and_says_so() -> None:
    """Its states are told."""
    found = estimated(model__fused="false")
    assert not found.whole and found.memory.activations == 0 and not found.operations
    text = "\n".join(cost_lines(found, total_steps=10))
    assert "and activations, which are modelled for the fused pass alone" in text and "FLOP" not in text


def test_spans_are_told_in_the_unit_that_one_would_say(on_pocket: Estimate) -> None:
    """Seconds, minutes, hours."""
    for seconds, told in ((1.0, "= 100 s,"), (6.0, "= 10 min,"), (360.0, "= 10.0 h,")):
        of = Estimate(1, on_pocket.largest, on_pocket.memory, True, {}, Time(seconds, "a watch", {}), None)
        assert told in "\n".join(cost_lines(of, total_steps=100))

"""Peak memory from shapes: held to a step that is really measured, and to what each setting must do to it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import anatomy, on, samples
from trainer.cost.layer_memory import FLOAT, Format
from trainer.cost.memory import Again, Layout, peak_memory, states
from trainer.cost.microbatch import MicroBatch
from trainer.strategy import Part

ROOT = Path(__file__).parents[3]
BOTH = frozenset({Part.VISION, Part.LLM})
ON_CPU = Layout(4, Format(4, gpu=False))
ON_GPU = Layout(2, Format(2, gpu=True), checkpointed=BOTH)
DIGITS = MicroBatch((170,) * 8, (36,) * 8, 500, shared=84)


def test_a_step_on_pocket_holds_what_is_computed_within_15_percent() -> None:
    """Two scenes in a process of their own, every tensor counted; checkpointed, so that both ways are walked."""
    script = [sys.executable, str(ROOT / "benchmarks" / "peak_memory.py"), "--cell", "all_full:2:vision"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"arm"')]
    told = json.loads(line)
    assert told["computed_bytes"] == pytest.approx(told["peak_bytes"], rel=0.15)
    assert told["above_bytes"] > 2**20, "the step has been seen"


def test_states_are_sixteen_bytes_a_trained_parameter_and_the_base() -> None:
    """Master, gradient and two moments in float32; the frozen base in its own format; LoRA's pairs count, not what
    they adapt.
    """
    of = anatomy("pocket", "last6_lora")
    assert of.all_trained == 902_976  # what `plan` prints
    held = states(of, DIGITS, ON_CPU)
    assert (held.base, held.trained, held.moments) == (5_961_984 * 4, 902_976 * 4, 902_976 * 8)
    empty = MicroBatch((64,), (4,), 1)
    assert peak_memory(of, empty, replace(ON_CPU, accumulation=2)).gradients == 902_976 * FLOAT
    assert states(of, DIGITS, replace(ON_CPU, weight=2)).base == 5_961_984 * 2


def test_zero_2_splits_moments_and_gradients_over_ranks_and_zero_1_the_moments_alone() -> None:
    """Of eight ranks each holds an eighth; without ZeRO each holds all, and a buffer for the exchange."""
    of = anatomy("pocket", "all_full")
    n = of.all_trained * FLOAT
    alone, zero1, zero2 = (replace(ON_CPU, ranks=8, zero=stage, accumulation=2) for stage in (0, 1, 2))
    held = [peak_memory(of, DIGITS, layout) for layout in (alone, zero1, zero2)]
    assert [memory.moments for memory in held] == [2 * n, 2 * n // 8, 2 * n // 8]
    assert [memory.gradients for memory in held] == [n, n, n // 8]
    assert [memory.exchange for memory in held] == [n, n // 8 + n, n // 8 + n]
    assert states(of, DIGITS, ON_CPU).exchange == 0


def test_a_frozen_beginning_keeps_nothing_and_more_trained_blocks_keep_more() -> None:
    """By the arms' order; the layers of the language model are reached in all of them, for the aligner trains."""
    arms = ("frozen_vision", "last6_full", "all_full")
    kept = [peak_memory(anatomy("pocket", arm), DIGITS, ON_CPU).activations for arm in arms]
    assert kept[0] < kept[1] < kept[2]
    assert not any(layer.reached for layer in anatomy("pocket", "frozen_vision").vision.layers)
    assert [layer.reached for layer in anatomy("pocket", "last6_full").vision.layers] == [False] * 18 + [True] * 6
    assert all(layer.reached for layer in anatomy("pocket", "frozen_vision").text.layers)


def test_checkpointed_layers_keep_their_input_and_on_a_roomy_gpu_all_but_the_widest_rows() -> None:
    """As `trainer.fused.layers` decides; what is remade is said for each layer."""
    of, batch = anatomy("random:4b", "last6_lora"), samples(10)
    bare = peak_memory(of, batch, replace(ON_GPU, checkpointed=frozenset()))
    roomy = peak_memory(of, batch, ON_GPU)
    tight = peak_memory(of, batch, replace(ON_GPU, inputs_only=True))
    assert tight.activations < roomy.activations < bare.activations
    assert set(roomy.remade.values()) == {Again.WIDE} and set(tight.remade.values()) == {Again.ALL}
    assert {part for part, _ in tight.remade} == BOTH and not bare.remade
    assert min(index for part, index in tight.remade if part is Part.VISION) == 18
    card = int(1.2 * tight.total)  # room for some of the layers
    assert set(peak_memory(of, batch, replace(ON_GPU, card=card)).remade.values()) == {Again.WIDE, Again.ALL}


def test_words_that_all_samples_share_are_held_once() -> None:
    """In layers before everything trained; their keys and values are inputs."""
    of = anatomy("random:4b", "last6_lora")
    apart, shared = (peak_memory(of, samples(20, words), ON_GPU) for words in (0, 500))
    assert shared.activations < apart.activations
    assert shared.inputs > apart.inputs


def test_a_card_that_is_too_small_is_seen() -> None:
    """The frozen base is split by no strategy: the 32B's alone is 66.7 GB on every GPU."""
    one = on("32b", "all_full", 1)
    assert one.base == pytest.approx(66.7e9, rel=0.01)
    assert on("32b", "all_full", 1, gpus=8).base == one.base

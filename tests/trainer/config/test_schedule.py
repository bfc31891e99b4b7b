"""`strategy.vision.schedule`: its one form, and a message for everything else."""

import pytest

from tests.trainer.config.conftest import Fails, Write
from trainer.config.load import load
from trainer.errors import ConfigError

GOOD = "[{from: 0.0, blocks: last-2}, {from: 0.5, blocks: last-4}]"
KEY = "strategy.vision.schedule"


def staged(schedule: str, rest: str = "method: lora") -> str:
    """A file with a schedule in its fourth line."""
    return f"strategy:\n  vision:\n    {rest}\n    schedule: {schedule}\n"


def test_stages_are_read_and_written_back(write: Write) -> None:
    """`from` is a word of Python's, and is the key in files, params and the file that is kept."""
    resolved = load(write(staged(GOOD)))
    assert resolved.config.strategy is not None
    assert resolved.config.strategy.vision.stages == ((0.0, "last-2"), (0.5, "last-4"))
    assert resolved.params()[KEY] == '[{"from": 0.0, "blocks": "last-2"}, {"from": 0.5, "blocks": "last-4"}]'
    assert load(write(resolved.to_yaml(), "kept.yaml")).config == resolved.config


def test_without_one_there_is_a_single_stage() -> None:
    """Of the blocks that are named; `null` is no schedule."""
    config = load("last6_lora", overrides={KEY: "null"}).config
    assert config.strategy is not None and config.strategy.vision.stages == ((0.0, "last-6"),)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("[]", "a schedule without stages"),
        ("[{from: 0.1, blocks: last-2}]", "stages from 0.1"),
        ("[{from: 0.0, blocks: last-2}, {from: 0.0, blocks: last-4}]", "stages from 0.0, 0.0"),
        ("[{from: 0, blocks: last-2}, {from: 0.6, blocks: last-4}, {from: 0.3, blocks: all}]", "from 0.0, 0.6, 0.3"),
        ("[{from: 0.0, blocks: last-2}, {from: 1.0, blocks: last-4}]", "less than 1"),
        ("[{from: -0.1, blocks: last-2}]", "at least 0"),
        ("[{from: 0.0, blocks: none}]", "no blocks in the stage from 0.0"),
        ("[{from: 0.0, blocks: first-2}]", "last-N"),
        ("[{from: soon, blocks: last-2}]", "a number"),
        ("[{from: 0.0}]", "schedule[0].blocks"),
        ("[{blocks: last-2}]", "schedule[0].from"),
        ("[{from: 0.0, bloks: last-2}]", "did you mean blocks?"),
        ("[{from: 0.0, blocks: last-2, method: full}]", "from, blocks"),
        ("[last-2, last-4]", "a map of keys"),
        ("last-2", "a list"),
        ("{from: 0.0, blocks: last-2}", "a list"),
    ],
)
def test_another_one_is_refused_with_its_line(fails: Fails, schedule: str, said: str) -> None:
    """Where, what was got, what is allowed, what to do."""
    told = fails(staged(schedule))
    assert said in told and "their.yaml:4: " + KEY in told


def test_blocks_and_a_schedule_exclude_each_other(fails: Fails) -> None:
    """In one file and across files; the message says what to take out."""
    told = fails(staged(GOOD, "method: lora\n    blocks: last-6"))
    assert "their.yaml:4: strategy.vision.blocks" in told and "take the schedule out" in told
    with pytest.raises(ConfigError, match=r"experiments/last6_lora\.yaml:9: strategy\.vision\.blocks"):
        load("last6_lora", overrides={KEY: GOOD})


def test_all_stages_have_one_method_that_trains(fails: Fails) -> None:
    """Frozen blocks have no schedule."""
    assert "a schedule with method frozen" in fails(staged(GOOD, "method: frozen"))

"""What is advised after a comparison: how sure, what to run next, commands that mean the runs they are given for."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from analysis.advice import Recommendation, _for_both, command_of, next_steps, recommendation
from analysis.checks import Finding
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.reproduction import _commands
from analysis.runs import Run
from tests.analysis.test_ranking import run
from trainer.config.load import load

LOSS = "eval/loss"
UNEQUAL = Finding("unequal_budget", "")


def ranking(losses: dict[str, list[float]], **more: Any) -> Ranking:
    """Arms with seeds 17, 18, ..."""
    runs = [run(arm, 17 + place, loss, **more) for arm, of in losses.items() for place, loss in enumerate(of)]
    found = [read(one, LOSS, At(), {}) for one in runs]
    return rank([one for one in found if isinstance(one, Reading)], LOSS, At())


APART = {"a": [0.500, 0.502, 0.498], "b": [0.600, 0.603, 0.599]}
TIED = {"a": [0.500, 0.520, 0.480], "b": [0.510, 0.500, 0.505]}


def advised(losses: dict[str, list[float]], *findings: Finding) -> Recommendation:
    """The recommendation for arms with these losses."""
    return recommendation(ranking(losses), findings)


@pytest.mark.parametrize(
    ("losses", "findings", "confidence"),
    [
        (APART, [], "high"),
        (APART, [UNEQUAL], "moderate"),
        (TIED, [], "low"),
        ({arm: of[:2] for arm, of in APART.items()}, [], "low"),  # two seeds
        ({arm: of[:1] for arm, of in APART.items()}, [], "none"),
        ({"a": [0.5, 0.5]}, [], "none"),
    ],
)
def test_confidence_is_what_the_numbers_allow(
    losses: dict[str, list[float]], findings: list[Finding], confidence: str
) -> None:
    """High only where every difference is told, on three seeds, and nothing else could explain it."""
    found = advised(losses, *findings)
    assert (found.arm, found.confidence) == ("a", confidence)


def test_what_else_could_explain_the_winner_is_said() -> None:
    """In words."""
    assert "arms did not see the same amount of data" in " ".join(advised(APART, UNEQUAL).why)


def test_of_arms_that_cannot_be_told_apart_the_smaller_is_named() -> None:
    """Here the loser by a hair trains a tenth of the parameters."""
    runs = [
        run(arm, seed, loss, params={"trainable_parameters/total": size})
        for arm, size in (("a", "1000"), ("b", "100"))
        for seed, loss in enumerate(TIED[arm])
    ]
    found = [read(one, LOSS, At(), {}) for one in runs]
    ranked = rank([one for one in found if isinstance(one, Reading)], LOSS, At())
    assert "b trains the fewest parameters" in " ".join(recommendation(ranked, []).why)


# --- what to run next ---------------------------------------------------------------------------------------------


def shipped(strategy: str, seed: int, loss: float, profile: str = "pocket", **changes: str):  # type: ignore[no-untyped-def]
    """A run of a shipped experiment, with all its params."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    params = load(strategy, profile=profile, overrides={**changed, "seed": str(seed)}).params()
    one = read(run(strategy, seed, loss, params=params, tags={"profile": profile}), LOSS, At(), {})
    assert isinstance(one, Reading)
    return one


def test_seeds_missing_cells_and_neighbours_are_proposed_with_commands() -> None:
    """LoRA on six and on all blocks, one seed each: seeds, the two full arms, four and eight blocks, rates, ranks."""
    ranked = rank([shipped("last6_lora", 17, 0.5), shipped("all_lora", 17, 0.6)], LOSS, At())
    steps = next_steps(ranked, [Finding("rates_not_tuned", "")])
    commands = [step.command.removeprefix("mlflow run . -e ") for step in steps if step.command]
    assert [command.replace(" --env-manager local", "") for command in commands] == [
        "last6_lora -P seed=18",
        "all_lora -P seed=18",
        "last6_full -P seed=17",
        "all_full -P seed=17",
        "last6_lora -P seed=17 -P strategy.vision.blocks=last-4",
        "last6_lora -P seed=17 -P strategy.vision.blocks=last-8",
        "last6_lora -P seed=17 -P training.vit_lr=6e-05",
        "last6_lora -P seed=17 -P training.vit_lr=0.00024",
        "last6_lora -P seed=17 -P tuner.lora_rank=8",
        "last6_lora -P seed=17 -P tuner.lora_rank=32",
    ]
    assert "same number of tries" in steps[-1].why


def test_what_was_tried_is_not_proposed_again() -> None:
    """Rank 8 was run."""
    ranked = rank([shipped("last6_lora", 17, 0.5), shipped("last6_lora", 17, 0.6, tuner__lora_rank="8")], LOSS, At())
    neighbours = [step.command for step in next_steps(ranked, []) if "Neighbour" in step.why]
    assert not any("lora_rank=8" in command for command in neighbours)
    assert any("lora_rank=32" in command for command in neighbours)


def test_seeds_that_would_settle_an_open_difference_are_counted() -> None:
    """Three seeds, a mean difference of .005 that scatters as widely: many more; equal arms: none would do."""
    (step,) = [step for step in next_steps(ranking(TIED), []) if "power" in step.why]
    assert int(step.why.split()[1]) > 10
    same = {"a": [0.50, 0.52, 0.48], "b": [0.48000001, 0.50, 0.52]}
    assert any("treat them as equal" in step.why for step in next_steps(ranking(same), []))


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "profile", "changes"),
    [
        ("last6_lora", "pocket", {}),
        ("all_full", "pocket", {"training__vit_lr": "1e-4", "custom__digits__train": "64"}),
        ("last6_full", "pocket", {"launch__nproc": "2", "training__gradient_accumulation_steps": "1"}),
        (
            "frozen_vision",
            "published",
            {"custom__train_jsonl": "my train.jsonl", "custom__val_jsonl": "v.jsonl"},
        ),
    ],
)
def test_a_command_means_the_configuration_that_ran(
    strategy: str, profile: str, changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken apart as the shell does and resolved again, it gives the same params."""
    monkeypatch.chdir(tmp_path)
    for value in changes.values():
        if value.endswith(".jsonl"):
            Path(value).touch()
    one = shipped(strategy, 21, 0.5, profile, **changes).run
    words = shlex.split(command_of(one))
    assert words[:7] == ["mlflow", "run", ".", "-e", strategy, "--env-manager", "local"]
    given = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "-P")
    again = load(strategy, profile=given.pop("profile", None), overrides=given).params()
    assert again == {key: value for key, value in one.params.items() if key in again}


def test_what_others_have_trained_has_no_command() -> None:
    """Nor has a strategy that is not shipped."""
    assert command_of(run("last6_lora", tags={"source": "published"})) == ""
    assert command_of(run("their/own")) == ""


def test_a_tag_of_somebody_else_is_no_part_of_a_command_to_be_pasted() -> None:
    """A shared store may hold any seed: it is quoted, and in no loop."""
    hostile = "$(touch x)"
    runs = [shipped("last6_lora", seed, 0.5).run for seed in (1, 2)]
    theirs = replace(
        runs[0], tags={**runs[0].tags, "seed": hostile}, params={**runs[0].params, "training.seed": hostile}
    )
    told = _commands([*runs, theirs])
    assert told[0].startswith("for seed in 1 2; do") and len(told) == 2
    assert all(hostile not in re.sub(r"'[^']*'", "", command) for command in told)
    one, other = rank(
        [*map(final, runs), final(replace(theirs, tags={**theirs.tags, "strategy": "b"}))], LOSS, At()
    ).rows
    assert all(hostile not in command for command in _for_both(one, other, 3))


def final(one: Run) -> Reading:
    """A run, read at its end."""
    found = read(one, LOSS, At(), {})
    assert isinstance(found, Reading)
    return found

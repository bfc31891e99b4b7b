"""Params of runs as settings: what makes an arm, and when two spellings are the same value."""

import pytest
import yaml

from analysis.settings import ACCUMULATION, differing, is_idle, is_setting, same, setting
from tests.analysis.test_ranking import run
from tests.running import ROOT


@pytest.mark.parametrize(
    "key",
    ["training.seed", "seed", "profile", "model", "max_steps", "output_dir", "tracking.probe_records", "launch.nproc",
     "trainable_parameters/total", "vision.blocks_resolved", "dtype/vision"],
)  # fmt: skip
def test_what_makes_no_arm(key: str) -> None:
    """Seeds, folders, tracking; short names that `mlflow run` logs beside ours; what follows from the settings."""
    assert not is_setting(key)


def test_what_mlflow_run_logs_of_its_own_makes_no_arm() -> None:
    """Every parameter of every entry point: a run that it started is of the arm of one that a comparison started."""
    entries = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    trained = {name: of["parameters"] for name, of in entries.items() if " trainer run " in of["command"]}
    assert "last6_lora" in trained and "main" in trained
    assert [key for parameters in trained.values() for key in parameters if is_setting(key)] == []


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("1e-4", "0.0001", True), ("no", "false", True), ("True", "true", True), ("8", "8.0", True), ("8", "16", False),
     ("last-6", "last-6", True), ("null", None, False)],
)  # fmt: skip
def test_spellings_of_one_value(one: str, other: str | None, equal: bool) -> None:
    """`mlflow run -P training.vit_lr=1e-4` logs what was typed."""
    assert (same(one) == same(other)) is equal


def test_where_runs_differ() -> None:
    """Strategy first; a param that was typed otherwise is no difference; what is derived is told where wanted."""
    runs = [
        run(seed=17, params={"model.model": "a", "strategy.vision.blocks": "all", "training.vit_lr": "1e-4",
                             "seed": "17"}),
        run(seed=18, params={"model.model": "b", "strategy.vision.blocks": "last-6", "training.vit_lr": "0.0001",
                             "trainable_parameters/total": "5"}),
    ]  # fmt: skip
    assert differing(runs) == ["strategy.vision.blocks", "model.model"]
    assert differing(runs, derived=True) == ["strategy.vision.blocks", "model.model", "trainable_parameters/total"]


def test_the_switch_of_augmentation_is_no_setting_beside_its_mode() -> None:
    """`off` and `clean` differ in one setting; where one run has a switch only, that is what is known."""
    off = run(params={"custom.augmentation.mode": "off", "custom.augmentation.enabled": "false"})
    clean = run(params={"custom.augmentation.mode": "clean", "custom.augmentation.enabled": "true"})
    assert differing([off, clean]) == ["custom.augmentation.mode"]
    older = run(params={"custom.augmentation.enabled": "true"})
    assert "custom.augmentation.enabled" in differing([off, older])


@pytest.mark.parametrize(
    ("key", "mode", "idle"),
    [("enabled", "clean", True), ("ops", "clean", False), ("ops", "off", True), ("mode", "off", False)],
)
def test_what_does_nothing_in_a_run_is_known(key: str, mode: str, idle: bool) -> None:
    """How to augment where nothing is augmented; a switch that the mode repeats."""
    assert is_idle(f"custom.augmentation.{key}", {"custom.augmentation.mode": mode}) is idle
    assert not is_idle("tuner.lora_rank", {"custom.augmentation.mode": mode})


def test_how_ranks_share_a_step_makes_no_arm() -> None:
    """Two ranks that accumulate one are one that accumulates two; four of a step are another setting."""
    layouts = [("1", "2"), ("2", "1"), ("2", "2")]
    runs = [run(params={"launch.nproc": ranks, ACCUMULATION: each}) for ranks, each in layouts]
    assert differing(runs[:2]) == []
    assert differing(runs) == [ACCUMULATION]
    older = run(params={ACCUMULATION: "2"})  # of code, or of others, that say nothing of ranks
    assert differing([runs[0], older]) == [] and setting(older.params, ACCUMULATION) == "2.0"
    assert setting({ACCUMULATION: "2", "launch.nproc": "auto"}, ACCUMULATION) == "2.0"

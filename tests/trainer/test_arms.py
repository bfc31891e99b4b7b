"""Arms and seeds as they are written, the command that each run is, and what is refused before anything starts."""

from pathlib import Path

import pytest

from trainer.__main__ import cli
from trainer.compare.arms import Arm, arguments, enter, parse_arms, parse_seeds
from trainer.compare.asked import Asked
from trainer.compare.tuning import factors, trial_seed
from trainer.config.load import load
from trainer.errors import ConfigError


def test_an_arm_is_a_strategy_or_has_a_name_and_settings_of_its_own() -> None:
    """A comma inside of a list, and the plus of a number, part nothing."""
    assert parse_arms("last6_lora, configs/mine.yaml") == (
        Arm("last6_lora", "last6_lora"),
        Arm("mine", "configs/mine.yaml"),
    )
    assert parse_arms("a=last6_lora,b=last6_lora+training.vit_lr=1e-4+tuner.lora_rank=8") == (
        Arm("a", "last6_lora"),
        Arm("b", "last6_lora", {"training.vit_lr": "1e-4", "tuner.lora_rank": "8"}),
    )
    (arm,) = parse_arms("x=last6_lora+strategy.vision.blocks=[5,11]+training.max_grad_norm=1e+2")
    assert arm.settings == {"strategy.vision.blocks": "[5,11]", "training.max_grad_norm": "1e+2"}
    assert parse_arms("last6_lora+training.vit_lr=1e-4")[0].name == "last6_lora+vit_lr=1e-4"
    assert parse_arms("a=last6_lora+max_steps=3")[0].settings == {"training.max_steps": "3"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "STRATEGY, or NAME=STRATEGY"),
        ("last6_lora,", "STRATEGY, or NAME=STRATEGY"),
        ("a=", "STRATEGY, or NAME=STRATEGY"),
        ("a b=last6_lora", "STRATEGY, or NAME=STRATEGY"),
        ("last6_lora,last6_lora", "last6_lora more than once"),
        ("a=last6_lora,a=last6_full", "a more than once"),
        ("a=last6_lora+training.seed=3", "seeds says it here"),
        ("a=last6_lora+output_dir=x", "output_dir says it here"),
        ("a=last6_lora+tracking.arm=b", "NAME=STRATEGY in --strategies says it here"),
    ],
)
def test_what_is_no_arm_is_told(text: str, said: str) -> None:
    """With an example of what is one."""
    with pytest.raises(ConfigError) as error:
        parse_arms(text)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "17,", "17,17", "1.5", "-3", "a", "17;18", "²"])
def test_what_are_no_seeds_is_told(text: str) -> None:
    """Different whole numbers."""
    with pytest.raises(ConfigError, match="different whole numbers"):
        parse_seeds(text)
    assert parse_seeds("17, 3") == (17, 3)


def test_a_run_of_an_arm_is_a_command_that_loads_to_its_configuration() -> None:
    """Named arms say so, plain ones are called as ever; an arm's own settings lie over those of all."""
    common = {"tuner.lora_rank": "4", "launch.gpus": "0"}
    arms = enter(parse_arms("last6_lora,b=last6_lora+tuner.lora_rank=8"), 17, None, common)
    for entered, rank, name in zip(arms, (4, 8), ("last6_lora+lora_rank=4", "b"), strict=True):
        strategy, *rest = arguments(entered, 18, "pocket", common)
        given = dict(zip(rest[::2], rest[1::2], strict=True))
        assert given.pop("--profile") == "pocket"
        resolved = load(strategy, profile="pocket", overrides={key[2:]: value for key, value in given.items()})
        assert (resolved.config.training.seed, resolved.config.tuner.lora_rank) == (18, rank)
        assert resolved.arm == name
        assert resolved.config.launch.nproc == 1 and resolved.config.launch.gpus is None


def test_the_gpus_of_a_comparison_are_those_that_its_arms_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a file; they are dealt out to all runs, so that all arms name the same, and such as are there."""
    monkeypatch.setattr("trainer.launch.may_have_gpus", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("trainer.compare_command.quiet_libraries", lambda: None)
    begun = list[Asked]()
    monkeypatch.setattr("trainer.compare_command._run", begun.append)
    (tmp_path / "mine.yaml").write_text("launch: {gpus: '2,3'}\n")

    def dealt(*settings: str, on_line: tuple[str, ...] = ()) -> tuple[str, ...]:
        arms = ",".join(f"a{number}={tmp_path}/mine.yaml{more}" for number, more in enumerate(settings))
        cli(["compare", "--strategies", arms, *on_line], standalone_mode=False)
        return begun.pop().gpus

    assert dealt("", "+tuner.lora_rank=8") == ("2", "3")
    assert dealt("", on_line=("--gpus", "1")) == ("1",)
    assert dealt("+launch.gpus=null") == ("0", "1", "2", "3")
    with pytest.raises(ConfigError, match=r"mine.yaml:1: launch.gpus\n  got: +2,3 in arm a0, 1 in arm a1"):
        dealt("", "+launch.gpus=1")
    with pytest.raises(ConfigError, match="4 on a machine where 4 can be seen"):
        dealt("", on_line=("--gpus", "4"))


def test_the_rate_that_is_tried_is_that_of_vision_where_vision_trains() -> None:
    """Else the aligner's; both times from the value that the arm would have."""
    lora, frozen = enter(parse_arms("last6_lora,frozen_vision"), 17, None, {"training.aligner_lr": "3e-5"})
    assert (lora.rate, lora.rate_now) == ("training.vit_lr", 1.2e-4)
    assert (frozen.rate, frozen.rate_now) == ("training.aligner_lr", 3e-5)
    assert factors(3) == (0.5, 1.0, 2.0) and factors(5) == (0.25, 0.5, 1.0, 2.0, 4.0)
    assert trial_seed([17, 19, 18]) == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategies", "last6_lroa"], "last6_lora"),
        (["--strategies", "a=last6_lora+training.vit_rl=1"], "did you mean training.vit_lr?"),
        (["--tuner.lora_rnak", "8"], "did you mean tuner.lora_rank?"),
        (["--seed", "3"], "seeds says it here"),
        (["--seeds", "17,x"], "different whole numbers"),
        (["--policy", "quarter"], "full, halving"),
        (["--tune", "2"], "0, 3, 5"),
        (["--margin", "1 %"], "a number above 0 and below 1"),
        (["--error", "0.7"], "a number above 0 and below 0.5"),
        (["--jobs", "0"], "a whole number from 1"),
        (["--max_steps", "2", "--training.max_steps", "3"], "given twice"),
        (["--policy", "halving", "--training.eval_steps", "2"], "training.eval_samples"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made, no store is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.compare_command._run", lambda asked: pytest.fail("it was begun"))
    with pytest.raises(ConfigError) as error:
        cli(["compare", *arguments], standalone_mode=False)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []

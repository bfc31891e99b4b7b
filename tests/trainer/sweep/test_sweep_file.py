"""A sweep's file: what it means, and that every mistake in it is told with file and line before anything is trained."""

from pathlib import Path

import pytest

from trainer.config.places import experiments_dir
from trainer.errors import ConfigError
from trainer.sweep.space import Choices, Range, grid, name_of
from trainer.sweep.sweep_file import Sweep, read_sweep

SHIPPED = {
    "vit_lr": (4, 3),
    "rank": (3, 3),
    "blocks": (6, 3),
    "accumulation": (4, 3),
    "augmentation": (4, 3),
}
"""File -> points, seeds."""


def written(folder: Path, text: str) -> str:
    """A sweep's file with this text; its path."""
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def read(folder: Path, text: str, **more: str) -> Sweep:
    """The sweep that a text means."""
    return read_sweep(written(folder, text), **more)  # type: ignore[arg-type]  # texts, as the command line has them


def told(folder: Path, text: str, **more: str) -> str:
    """The message that a text gets."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, **more)
    return str(caught.value)


def test_these_are_the_sweeps_that_are_shipped() -> None:
    """Every file in `experiments/sweeps/`."""
    assert {path.stem for path in (experiments_dir() / "sweeps").glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_a_grid_of_points_and_seeds_that_all_can_be_trained(name: str) -> None:
    """By its name alone; each point is another configuration."""
    sweep = read_sweep(name)
    points, seeds = SHIPPED[name]
    assert sweep.trials == points * seeds
    configurations = {str(sweep.of(point)) for point in grid(sweep.axes)}
    assert len(configurations) == sweep.trials


def test_seeds_are_the_last_axis_of_a_grid_so_that_every_point_comes_once_before_any_comes_twice() -> None:
    """Whoever stops early has all points on one seed."""
    sweep = read_sweep("vit_lr", seeds="5,6")
    order = [(point["training.vit_lr"], point["training.seed"]) for point in grid(sweep.axes)]
    assert order[:5] == [("0.0001", "5"), ("0.00012", "5"), ("0.00015", "5"), ("0.0002", "5"), ("0.0001", "6")]


def test_a_choice_may_set_several_keys_and_may_be_the_configuration_itself(tmp_path: Path) -> None:
    """Keys that belong together are one axis."""
    sweep = read(
        tmp_path,
        "space:\n"
        "  strategy: [all_lora, all_full]\n"
        "  size:\n"
        "    - {name: small, set: {tuner.lora_rank: 8, tuner.lora_alpha: 16}}\n"
        "    - {name: large, set: {tuner.lora_rank: 32, tuner: {lora_alpha: 64}}}\n",
        profile="pocket",
    )
    point = {"strategy": "all_full", "size": "large", "training.seed": "17"}
    assert sweep.of(point) == (
        "all_full",
        {"tuner.lora_rank": "32", "tuner.lora_alpha": "64", "training.seed": "17"},
    )
    config = sweep.resolved(point).config
    assert (config.tuner.lora_rank, config.tuner.lora_alpha, config.training.vit_lr) == (32, 64, 3e-5)


def test_bounds_are_for_samplers_that_draw(tmp_path: Path) -> None:
    """Short names stand for full ones; one seed for all points; options go to Optuna."""
    sweep = read(
        tmp_path,
        "strategy: last6_lora\n"
        "settings: {max_steps: 5}\n"
        "space:\n"
        "  training.vit_lr: {log_uniform: [1.0e-5, 1.0e-3]}\n"
        "  tuner.lora_dropout: {uniform: [0, 0.3]}\n"
        "  tuner.lora_rank: {log_int: [2, 64]}\n"
        "sampler: {name: tpe, seed: 3, n_startup_trials: 4}\n"
        "trials: 12\n"
        "seeds: [18]\n"
        "pruner: {name: median, n_startup_trials: 2}\n",
    )
    assert sweep.axes == (
        Range("training.vit_lr", 1e-5, 1e-3, log=True, whole=False),
        Range("tuner.lora_dropout", 0, 0.3, log=False, whole=False),
        Range("tuner.lora_rank", 2, 64, log=True, whole=True),
    )
    assert (sweep.trials, sweep.sampler.options, sweep.pruner.options) == (
        12,
        {"seed": 3, "n_startup_trials": 4},
        {"n_startup_trials": 2},
    )
    config = sweep.resolved({"training.vit_lr": 2e-5, "tuner.lora_dropout": 0.1, "tuner.lora_rank": 7}).config
    assert (config.training.seed, config.training.max_steps, config.tuner.lora_rank) == (18, 5, 7)


def test_the_command_line_sets_keys_for_all_points_and_takes_the_place_of_seeds_and_trials(tmp_path: Path) -> None:
    """What is not given there is the file's."""
    text = "strategy: last6_lora\nspace: {training.vit_lr: {uniform: [0.1, 0.2]}}\nsampler: random\ntrials: 3\n"
    sweep = read_sweep(written(tmp_path, text), trials="5", seeds="", overrides={"max_steps": "2", "model": ""})
    assert (sweep.trials, sweep.fixed) == (5, {"training.max_steps": "2", "training.seed": "17"})


def test_points_have_names_for_people() -> None:
    """The last words of keys; numbers in four digits."""
    sweep = read_sweep("vit_lr", seeds="5")
    assert name_of(sweep.first()) == "vit_lr=0.0001, seed=5"
    assert name_of({"tuner.lora_dropout": 0.123456}) == "lora_dropout=0.1235"
    assert all(isinstance(axis, Choices) for axis in sweep.axes)


GRID = "strategy: last6_lora\nspace:\n  training.vit_lr: [1.0e-4]\n"
DRAWN = "strategy: last6_lora\nsampler: tpe\ntrials: 3\nspace:\n  training.vit_lr: {log_uniform: [1.0e-5, 1.0e-3]}\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GRID + "smapler: tpe\n", [":4: smapler", "did you mean sampler?"]),
        ("strategy: last6_lora\n", [":1: space", "say what the sweep varies"]),
        ("strategy: last6_lora\nspace: 3\n", [":2: space", "a map"]),
        ("space:\n  training.vit_lr: [1.0e-4]\n", [": strategy", "such as strategy: last6_lora"]),
        (GRID + "  strategy: [all_lora]\n", [":1: strategy", "one in the space"]),
        ("strategy: last6_lore\nspace:\n  training.vit_lr: [1.0e-4]\n", [":1", "did you mean last6_lora?"]),
        (GRID.replace("vit_lr", "vit_rl"), [":3: training.vit_rl", "did you mean training.vit_lr?"]),
        (GRID.replace("1.0e-4", "fast"), [":3: training.vit_lr", "'fast'", "a number"]),
        (GRID.replace("[1.0e-4]", "[1.0e-4, -1]"), [":3: training.vit_lr", "-1"]),
        (GRID.replace("[1.0e-4]", "[1.0e-4, 0.0001]"), [":3: space: training.vit_lr", "0.0001 twice"]),
        (GRID.replace("[1.0e-4]", "[]"), [":3: space: training.vit_lr", "write a list"]),
        (GRID.replace("[1.0e-4]", "1.0e-4"), [":3: space: training.vit_lr", "write a list"]),
        (GRID + "  rank:\n  - {name: a, set: {tuner.lora_rnak: 8}}\n", [":4: tuner.lora_rnak", "tuner.lora_rank?"]),
        (GRID + "  rank:\n  - {name: a}\n", [":4: space: rank", "{name: ..., set: {key: value, ...}}"]),
        (
            GRID + "  rate:\n  - {name: a, set: {training.vit_lr: 1}}\n",
            [":4: space: rate", "training.vit_lr, which training.vit_lr sets too"],
        ),
        (GRID + "settings: {training.vit_lr: 1}\n", [":3: space: training.vit_lr", "which is 1 for every point"]),
        (GRID + "settings: {training.vit_rl: 1}\n", [":4: training.vit_rl", "did you mean training.vit_lr?"]),
        (GRID + "  training.seed: [1, 2]\n", [":4: space: training.seed", "beside the space"]),
        (GRID + "seeds: 17\n", [":4: seeds", "a list of different whole numbers"]),
        (GRID + "seeds: [17, 17]\n", [":4: seeds", "[17, 17]"]),
        (GRID + "trials: 3\n", [":4: trials", "a grid has as many as points"]),
        (GRID + "profile: pokcet\n", ["pocket?"]),
        (GRID + "metric: eval/los\n", [":4: metric", "did you mean eval/loss?"]),
        (GRID + "metric: epoch\n", [":4: metric"]),
        (GRID + "sampler: gird\n", [":4: sampler", "did you mean grid?"]),
        (GRID + "sampler: {name: grid, seed: 3}\n", [":4: sampler", "'seed'", "no options with grid"]),
        (GRID + "pruner: {name: median, n_startup: 3}\n", [":4: pruner", "did you mean n_startup_trials?"]),
        (GRID + "pruner: percentile\n", [":4: pruner", "percentile"]),
        (GRID + "pruner: {name: percentile, percentile: 200}\n", [":4: pruner", "200"]),
        (GRID.replace("[1.0e-4]", "{uniform: [0, 1]}"), [":3: space: training.vit_lr", "say sampler: tpe"]),
        (DRAWN.replace("trials: 3\n", ""), ["trials", "write trials: 20"]),
        (DRAWN.replace("trials: 3", "trials: 0"), [":3: trials", "1 to 1000"]),
        (DRAWN + "seeds: [17, 18]\n", [":6: seeds", "one with sampler tpe"]),
        (DRAWN.replace("log_uniform", "loguniform"), [":5: space: training.vit_lr", "log_uniform"]),
        (DRAWN.replace("1.0e-5", "0"), [":5: space: training.vit_lr", "both above 0"]),
        (DRAWN.replace("1.0e-3", "1.0e-6"), [":5: space: training.vit_lr", "low < high"]),
        (DRAWN.replace("1.0e-3]", "1, 2]"), [":5: space: training.vit_lr", "two numbers"]),
        (DRAWN.replace("log_uniform", "int"), [":5: space: training.vit_lr", "two whole numbers"]),
        (DRAWN.replace("vit_lr", "vit_rl"), [":5: training.vit_rl", "did you mean training.vit_lr?"]),
        ("space: [\n", ["mine.yaml"]),
    ],
)
def test_a_mistake_is_told_with_its_line_and_what_to_do(tmp_path: Path, text: str, parts: list[str]) -> None:
    """Also where the schema of the configuration finds it."""
    message = told(tmp_path, text)
    assert all(part in message for part in parts), message


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    """Of the file's own form, all of them."""
    message = told(tmp_path, GRID + "seeds: none\nsampler: gird\nmetric: loss\n")
    assert message.startswith("3 mistakes")


def test_mistakes_of_the_command_line_name_it(tmp_path: Path) -> None:
    """And not a line of the file."""
    assert "--seeds: seeds" in told(tmp_path, GRID, seeds="17,x")
    assert "--trials: trials" in told(tmp_path, DRAWN, trials="many")
    assert "--trials: trials\n  got:     0\n" in told(tmp_path, DRAWN, trials="0")
    assert "--seeds: seeds\n  got:     ','\n" in told(tmp_path, GRID, seeds=",")
    with pytest.raises(ConfigError, match=r"-P training\.vit_rl"):
        read_sweep(written(tmp_path, GRID), overrides={"training.vit_rl": "1"})
    with pytest.raises(ConfigError, match="which is 1 for every point"):
        read_sweep(written(tmp_path, GRID), overrides={"training.vit_lr": "1"})
    with pytest.raises(ConfigError, match="--seeds 17,18"):
        read_sweep(written(tmp_path, GRID), overrides={"seed": "18"})


def test_a_grid_that_nobody_could_run_is_refused(tmp_path: Path) -> None:
    """A thousand points."""
    many = ", ".join(str(0.0001 * n) for n in range(1, 40))
    message = told(tmp_path, f"strategy: last6_lora\nspace:\n  training.vit_lr: [{many}]\n  aligner_lr: [{many}]\n")
    assert "1521 points" in message and "sampler: tpe" in message


def test_a_name_that_is_no_sweep_names_those_that_are() -> None:
    """With the nearest."""
    with pytest.raises(ConfigError, match=r"did you mean blocks\?"):
        read_sweep("block")

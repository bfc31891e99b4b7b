"""Method x augmentation: planted effects come out, none is claimed where there is none, and the report tells both."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from analysis.advice import next_steps
from analysis.comparison import CURVES_NEEDED, Comparison
from analysis.curves import last_write_wins
from analysis.effects import QUESTIONS, Effects, Factor, Question, two_by_twos
from analysis.plots import draw, interaction
from analysis.ranking import At, Ranking, Reading, rank, read
from analysis.sections import Material, document
from analysis.statistics import estimate, holm
from analysis.tables import as_json, markdown
from analysis.verdict import all_robustness
from tests.analysis.test_ranking import run
from trainer.config.load import load

LOSS = "eval/loss"
LORA_CLEAN, LORA_NOISY, FULL_CLEAN, FULL_NOISY = ARMS = (
    ("lora", "clean"), ("lora", "published_noisy"), ("full", "clean"), ("full", "published_noisy"),
)  # fmt: skip
RATES = {"lora": "0.00012", "full": "6e-05"}
DRAWS = 200

Arm = tuple[str, str]


def reading(arm: Arm, seed: int, value: float, by: str = LOSS, blocks: str = "last-6", **params: str) -> Reading:
    """One run of a method under a mode; `__` stands for a dot."""
    method, mode = arm
    own = {
        "strategy.vision.blocks": blocks, "strategy.vision.method": method, "training.vit_lr": RATES[method],
        "custom.augmentation.mode": mode, "custom.augmentation.enabled": "false" if mode == "off" else "true",
    } | {key.replace("__", "."): text for key, text in params.items()}  # fmt: skip
    id = "-".join([*arm, blocks, str(seed), *params.values()])
    strategy = f"{blocks.replace('-', '')}_{method}"
    one = read(run(strategy, seed, metrics={by: value}, params=own, id=id), by, At(), {})
    assert isinstance(one, Reading)
    return one


def ranked(values: dict[Arm, list[float]], by: str = LOSS, blocks: str = "last-6") -> Ranking:
    """Arm -> values of seeds 0, 1, ..."""
    return rank(
        [reading(arm, seed, v, by, blocks) for arm, of in values.items() for seed, v in enumerate(of)], by, At()
    )


def drawn(generator: np.random.Generator, *, lora: float, full: float, seeds: int = 5) -> dict[Arm, list[float]]:
    """Losses with a planted cost of noise for either method: arm + seed + residual, as spread as real runs are."""
    base = {LORA_CLEAN: 0.59, LORA_NOISY: 0.59 + lora, FULL_CLEAN: 0.60, FULL_NOISY: 0.60 + full}
    shared = generator.normal(0, 0.0045, seeds)
    return {arm: [*(loss + shared + generator.normal(0, 0.0045, seeds))] for arm, loss in base.items()}


def noise_effects(ranking: Ranking) -> list[Effects]:
    """The 2x2s of method and augmentation."""
    return two_by_twos(ranking, QUESTIONS["method_by_noise"])


HAND = {
    LORA_CLEAN: [0.50, 0.52, 0.51], LORA_NOISY: [0.51, 0.54, 0.52],
    FULL_CLEAN: [0.50, 0.50, 0.50], FULL_NOISY: [0.55, 0.57, 0.56],
}  # fmt: skip
"""Noise costs LoRA .01, .02, .01 and full .05, .07, .06."""


# --- effects ------------------------------------------------------------------------------------------------------


def test_effects_by_hand() -> None:
    """Of noise on each method, of method under each mode; interaction .04, .05, .05."""
    (found,) = noise_effects(ranked(HAND))
    assert found.levels == (("lora", "full"), ("clean", "published_noisy")) and found.within == "last-6"
    for effect, by_seed in (
        (found.second_at["lora"], [0.01, 0.02, 0.01]),
        (found.second_at["full"], [0.05, 0.07, 0.06]),
        (found.first_at["clean"], [0.00, -0.02, -0.01]),
        (found.first_at["published_noisy"], [0.04, 0.03, 0.04]),
        (found.interaction, [0.04, 0.05, 0.05]),
    ):
        wanted = estimate(by_seed)
        assert (effect.estimate.mean, effect.estimate.low, effect.estimate.n) == pytest.approx(
            (wanted.mean, wanted.low, 3)
        )
        assert effect.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


def test_the_interaction_is_corrected_apart_from_the_effects_at_single_levels() -> None:
    """It is the one question; the four others are corrected among themselves."""
    (found,) = noise_effects(ranked(HAND))
    others = [*found.first_at.values(), *found.second_at.values()]
    assert found.interaction.p_adjusted == found.interaction.p
    assert [one.p_adjusted for one in others] == holm([one.p for one in others])


def test_what_differs_beside_method_and_mode_is_told() -> None:
    """The learning rate of each method's own; the switch follows from the mode and is no setting beside it."""
    (found,) = noise_effects(ranked(HAND))
    assert found.confounded == {"training.vit_lr": ("0.00012", "0.00012", "6e-05", "6e-05")}


@pytest.mark.parametrize("missing", ARMS)
def test_without_four_cells_nothing_is_said(missing: Arm) -> None:
    """No effect, no section, no figure, no sentence."""
    ranking = ranked({arm: of for arm, of in HAND.items() if arm != missing})
    assert noise_effects(ranking) == [] and all_robustness(ranking) == []
    assert interaction(ranking, QUESTIONS["method_by_noise"]) is None
    assert "Robustness" not in report(ranking)


def test_off_is_no_level_of_noise() -> None:
    """Runs that were not augmented do not stand for those with clean labels."""
    off = {("lora", "off") if arm == LORA_CLEAN else arm: of for arm, of in HAND.items()}
    assert noise_effects(ranked(off)) == []


def test_each_depth_is_a_2x2_of_its_own() -> None:
    """Arms of other depths are not mixed, and the p of both interactions are corrected together."""
    readings = [
        reading(arm, seed, v + shift, blocks=blocks)
        for blocks, shift in (("last-6", 0.0), ("all", -0.1))
        for arm, of in HAND.items()
        for seed, v in enumerate(of)
    ]
    found = noise_effects(rank(readings, LOSS, At()))
    assert [one.within for one in found] == ["all", "last-6"]
    for one in found:
        assert {row.strategy for row in one.cells.values()} <= {f"{one.within.replace('-', '')}_{m}" for m in RATES}
    assert [one.interaction.p_adjusted for one in found] == holm([one.interaction.p for one in found])


def test_noise_is_taken_between_arms_that_differ_in_nothing_else() -> None:
    """LoRA of rank 8 was run under both modes; a better clean arm of rank 32, which has no like, is passed over."""
    readings = [reading(arm, seed, v) for arm, of in HAND.items() for seed, v in enumerate(of)]
    readings += [reading(LORA_CLEAN, seed, 0.40, tuner__lora_rank="32") for seed in range(3)]
    (found,) = noise_effects(rank(readings, LOSS, At()))
    assert found.second_at["lora"].estimate.mean == pytest.approx(0.04 / 3)


def test_any_two_settings_can_be_crossed() -> None:
    """Nothing of it is about augmentation: rank and prompt language, by a question of their own."""
    tuner, prompts = "tuner.lora_rank", "prompts.language"
    question = Question(
        "Rank and language",
        Factor(tuner, ("8", "16"), "rank", "ranks", "at", "rank"),
        Factor(prompts, ("en", "zh"), "language", "languages", "in", "language"),
    )
    losses = {("8", "en"): 0.5, ("8", "zh"): 0.6, ("16", "en"): 0.4, ("16", "zh"): 0.7}
    readings = [
        reading(LORA_CLEAN, seed, loss + seed / 100, tuner__lora_rank=rank_, prompts__language=language)
        for (rank_, language), loss in losses.items()
        for seed in range(3)
    ]
    (found,) = two_by_twos(rank(readings, LOSS, At()), question)
    means = [one.estimate.mean for one in (found.first, found.second, found.interaction)]
    assert means == pytest.approx([0.0, 0.2, 0.2]) and found.confounded == {}


# --- the verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "full", "begins"),
    [
        (0.005, 0.035, "LoRA is more robust than full: published_noisy costs full 0.0"),
        (0.035, 0.005, "full is more robust than LoRA: published_noisy costs LoRA 0.0"),
    ],
)
def test_a_planted_interaction_is_found(lora: float, full: float, begins: str) -> None:
    """In every one of twenty draws, with its sign."""
    generator = np.random.default_rng(5)
    for _ in range(20):
        (told,) = all_robustness(ranked(drawn(generator, lora=lora, full=full)))
        assert told.startswith("Vision blocks last-6: " + begins), told
        low, high = re.findall(r"[+-]0\.\d{4}", told)
        assert 0 < float(low) < float(high) and "paired, n = 5" in told


@pytest.mark.parametrize("cost", [0.0, 0.03])
def test_none_is_claimed_where_noise_costs_both_the_same(cost: float) -> None:
    """Not in more than about 1 of 20 draws: 2 % and 8 % are as far as chance goes in 200."""
    generator = np.random.default_rng(7)
    told = [all_robustness(ranked(drawn(generator, lora=cost, full=cost)))[0] for _ in range(DRAWS)]
    claimed = sum("is more robust" in one or "harms neither" in one for one in told)
    assert 0.02 * DRAWS <= claimed <= 0.08 * DRAWS
    rest = [one for one in told if "No difference in robustness could be told between" in one]
    assert len(rest) == DRAWS - claimed and all(", 5 seeds: " in one for one in rest)


def test_with_one_seed_nothing_is_told() -> None:
    """Nor with seeds that the four arms do not share."""
    (told,) = all_robustness(ranked({arm: of[:1] for arm, of in HAND.items()}))
    assert told.endswith(
        "Which of LoRA and full is more robust cannot be told: too few seeds were run in all four arms."
    )
    apart = [reading(arm, 10 * i + seed, v) for i, (arm, of) in enumerate(HAND.items()) for seed, v in enumerate(of)]
    assert "cannot be told" in all_robustness(rank(apart, LOSS, At()))[0]


def test_where_higher_is_better_a_cost_is_a_loss_of_it() -> None:
    """F1 falls by .01 and by .06: LoRA bears it better."""
    (told,) = all_robustness(ranked({arm: [1 - v for v in of] for arm, of in HAND.items()}, by="eval/f1"))
    assert "LoRA is more robust than full: published_noisy costs full 0.0467 more than LoRA" in told


def test_noise_that_harms_nobody_makes_nobody_robust() -> None:
    """LoRA gains .05 by it and full nothing."""
    losses = {**HAND, LORA_NOISY: [0.45, 0.47, 0.455], FULL_NOISY: [0.50, 0.499, 0.50]}
    (told,) = all_robustness(ranked(losses))
    assert "published_noisy harms neither of LoRA and full: LoRA gains 0.0" in told and "robust" not in told


@pytest.mark.parametrize("by", ["train/loss", "train/loss_smoothed", "generalization_gap"])
def test_what_is_measured_on_changed_samples_says_nothing_of_robustness(by: str) -> None:
    """Noisy samples are harder to fit, whatever was learned."""
    (told,) = all_robustness(ranked(HAND, by=by))
    assert "says nothing about robustness" in told and "more robust" not in told


# --- where it is told ---------------------------------------------------------------------------------------------


def compared(ranking: Ranking) -> Comparison:
    """Without curves."""
    ids = [one.run.id for row in ranking.rows for one in row.readings]
    return Comparison(ranking, {id: dict.fromkeys({*CURVES_NEEDED, LOSS}, last_write_wins([])) for id in ids})


def report(ranking: Ranking) -> str:
    """As Markdown, with the figure named."""
    made = datetime(2026, 1, 2, tzinfo=UTC)
    return document(Material(compared(ranking), [], {}, ["method_by_noise"], "steps", made))


def test_rank_names_arms_by_their_mode_and_tells_who_bears_noise_better() -> None:
    """In the table, below it, and as JSON."""
    ranking = ranked(HAND)
    assert {row.label for row in ranking.rows} == {
        f"last6_{method} (augmentation {mode})" for method, mode in HAND
    }  # fmt: skip
    (told,) = all_robustness(ranking)
    assert told in markdown(ranking).replace("\\", "")
    tree = json.loads(as_json(ranking))
    assert told in tree["verdict"]
    (found,) = tree["interactions"]
    assert (found["question"], found["within"], found["n"]) == ("method_by_noise", "last-6", 3)
    assert found["mean"] == pytest.approx(0.14 / 3) and found["distinguishable"]
    assert all_robustness(replace(ranking, each=True)) == []


def test_the_mode_stands_in_an_arms_name_whatever_else_differs() -> None:
    """It comes before rank, rates and sizes, of which not all are told."""
    own = {"tuner__lora_rank": "8", "training__vit_lr": "1", "training__lr_scale": "2", "tuner__lora_dropout": "0"}
    ranking = rank([reading(LORA_CLEAN, 0, 0.5), reading(LORA_NOISY, 0, 0.5, **own)], LOSS, At())
    assert all(
        f"(augmentation {mode}, " in "".join(r.label for r in ranking.rows) for mode in ("clean", "published_noisy")
    )


def test_the_section_has_cells_effects_the_verdict_and_what_confounds() -> None:
    """In this order; effects with intervals and tests."""
    text = report(ranked(HAND)).split("\n## Robustness to noisy augmentation\n")[1].split("\n## ")[0]
    assert text.index("figures/method_by_noise.png") < text.index("LoRA is more robust than full")
    number = r"[+-]0\.\d{4}"
    line = rf"^\| (.*?) \| ({number}) \| {number} to {number} \| 3 \| \S+ \| (?:yes|no) \|$"
    effects = dict(re.findall(line, text.replace("\\", ""), re.MULTILINE))
    assert effects == {
        "noise with LoRA: published_noisy minus clean": "+0.0133",
        "noise with full: published_noisy minus clean": "+0.0600",
        "method under clean: full minus LoRA": "-0.0100",
        "method under published_noisy: full minus LoRA": "+0.0367",
        "interaction: what published_noisy adds with full, minus what it adds with LoRA": "+0.0467",
    }
    assert "the cells differ in more than method and noise" in text and "| `training.vit_lr` | 0.00012 |" in text
    assert "Cells of one method differ in noise alone" in text


def test_figures_show_a_line_a_method(tmp_path: Path) -> None:
    """Means of the four arms; a panel a depth; files that open."""
    question = QUESTIONS["method_by_noise"]
    figure = interaction(ranked(HAND), question)
    assert figure is not None
    (plot,) = figure.axes
    lines = {str(c.get_label()): c.lines[0].get_ydata().tolist() for c in plot.containers}
    assert lines == {"LoRA": pytest.approx([0.51, 1.57 / 3]), "full": pytest.approx([0.50, 0.56])}
    assert [tick.get_text() for tick in plot.get_xticklabels()] == ["clean", "published_noisy"]
    paths = draw(compared(ranked(HAND)), tmp_path, "steps")
    assert [path.stem for path in paths] == ["method_by_noise"] and paths[0].with_suffix(".svg").is_file()
    with Image.open(paths[0]) as image:
        assert min(image.size) > 200


# --- what to run next ---------------------------------------------------------------------------------------------


def shipped(strategy: str, mode: str) -> Reading:
    """A run of a shipped experiment under a mode, with all its params."""
    params = load(strategy, profile="pocket", overrides={"custom.augmentation.mode": mode, "seed": "17"}).params()
    one = read(
        run(strategy, 17, 0.5, params=params, id=f"{strategy}-{mode}", tags={"profile": "pocket"}), LOSS, At(), {}
    )
    assert isinstance(one, Reading)
    return one


def test_the_missing_cell_is_proposed_with_its_command() -> None:
    """Full under noise; nothing where noise was tried on nobody."""
    three = [shipped("last6_lora", "clean"), shipped("last6_lora", "published_noisy"), shipped("last6_full", "clean")]
    (step,) = [step for step in next_steps(rank(three, LOSS, At()), []) if "lacks" in step.why]
    assert step.why == "The 2x2 of method and noise lacks last6_full under published_noisy augmentation."
    assert step.command == (
        "mlflow run . -e last6_full --env-manager local -P custom.augmentation.mode=published_noisy -P seed=17"
    )
    clean = rank([three[0], three[2]], LOSS, At())
    assert not any("lacks" in step.why for step in next_steps(clean, []))
    never = rank([*three[:2], shipped("last6_full", "off")], LOSS, At())  # neither cell: two runs, and not one more
    assert not any("noise lacks" in step.why for step in next_steps(never, []))

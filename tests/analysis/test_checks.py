"""The careful reader: nine things in the published comparison, every planted fault in synthetic ones, nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from analysis.checks import CHECKS, careful_reading
from analysis.published import published_files, published_runs
from analysis.ranking import At, Reading, rank, read
from analysis.runs import Run
from analysis.subject import Arm, Subject, subject_of
from benchmarks import recorded
from tests.analysis.test_ranking import readings
from tests.analysis.test_ranking import run as a_run

NINE = {
    "overfitting": "within 29 % of the steps",
    "unequal_budget": "all_full (published) took the fewest steps (6,900) and was further along",
    "points_after_the_end": "8,000, 10,000",
    "margins": "0.0608/0.5550 = 10.955 %",
    "effective_batch": "gives 4 to 8 packs",
    "one_seed": "Every arm has one seed",
    "best_fit_disagrees": "last6_full (published) by smoothed train loss",
    "full_fits_better": "all_full (published) has 0.2171, last6_lora (published) 0.2001",
    "full_needs_accumulation": "last6_full (published) ran with 2",
}


def published(by: str = "eval/loss_smoothed", *more: Reading) -> Subject:
    """The shipped comparison, imported and ranked as the report ranks it; or otherwise, or with others in it."""
    (path,) = published_files()
    found = []
    for one in published_runs(path):
        by_step = sorted(one.rows, key=lambda row: row[1])
        metrics = {metric: value for metric, _, _, value in by_step}
        run = Run(one.key, one.name, "1", "FINISHED", 0, one.params, one.tags, metrics, by_step[-1][1])
        reading = read(run, by, At(), {})
        assert isinstance(reading, Reading)
        found.append(reading)
    return subject_of(rank([*found, *more], by, At()))


@pytest.mark.parametrize("check", NINE)
def test_what_is_wrong_with_the_published_report_is_found(check: str) -> None:
    """Its six written observations, and three that nobody had written down; each with its numbers."""
    (finding,) = CHECKS[check](published())
    assert NINE[check] in finding.text


def test_nothing_else_is_said_of_the_published_report_but_what_is_so() -> None:
    """Rates set by hand, accumulation 2 and 4, and no gate: true of it as well."""
    found = {finding.check for finding in careful_reading(published())}
    assert found == {*NINE, "accumulation", "rates_not_tuned", "gates"}


def test_what_was_printed_is_held_against_the_published_ranking_alone() -> None:
    """Margins only for the metric that they were printed for; nothing where other runs are in it as well."""
    assert "margins" not in {finding.check for finding in careful_reading(published("eval/loss"))}
    (ours,) = readings({"ours": [0.5]})
    found = {finding.check for finding in careful_reading(published("eval/loss", ours))}
    assert not found & {"margins", "effective_batch", "full_fits_better", "full_needs_accumulation"}
    assert "points_after_the_end" in found


# --- synthetic reports: a sound one, and faults planted in it -----------------------------------------------------


def sound() -> Subject:
    """Three arms, three seeds each, of which nothing can be said."""
    known = facts(base_model__digest="b", data__train_digest="t") | {"dtype/vision": frozenset({"float32"})}
    arms = [
        Arm(
            name=name, n_seeds=3, ranked=0.5 + shift, eval_loss=0.5 + shift, eval_loss_smoothed=0.5 + shift,
            train_loss=0.4 + shift, train_loss_smoothed=0.41 + shift, lowest=0.5 + shift, lowest_step=100,
            final_step=100, hours=2.0, samples=1600, gap=0.1, f1=0.6 - shift, vision_gain=0.3, micro_batch=1,
            accumulation=2, blocks=name, method=method, vit_lr=1e-4, facts=known,
        )
        for name, method, shift in (("first", "full", 0.0), ("second", "lora", 0.05), ("third", "lora", 0.1))
    ]  # fmt: skip
    return Subject(arms, margins={"second": 10.0, "third": 20.0}, effective_batch=(2, 2), full_fits_better=True,
                   full_needs_accumulation=2)  # fmt: skip


def with_arm(subject: Subject, index: int, **changes: Any) -> Subject:
    """One arm changed."""
    arms = [replace(arm, **changes) if i == index else arm for i, arm in enumerate(subject.arms)]
    return replace(subject, arms=arms)


def facts(**values: str) -> dict[str, frozenset[str]]:
    """Tags of an arm's runs; `__` stands for a dot."""
    return {key.replace("__", "."): frozenset({value}) for key, value in values.items()}


PLANTED: dict[str, Callable[[Subject], Subject]] = {
    "one_seed": lambda s: with_arm(s, 1, n_seeds=1),
    "diverged": lambda s: with_arm(s, 0, n_diverged=2),
    "overfitting": lambda s: with_arm(s, 2, lowest=0.55, lowest_step=20),
    "unequal_budget": lambda s: with_arm(s, 1, samples=3200),
    "accumulation": lambda s: replace(with_arm(s, 1, accumulation=4), effective_batch=(2, 4)),
    "points_after_the_end": lambda s: with_arm(s, 0, after_the_end={120: 0.49}),
    "margins": lambda s: replace(
        s, margins={"second": 9.1, "third": 20.0}
    ),  # of the loser's loss, as one is tempted to
    "effective_batch": lambda s: replace(s, effective_batch=(8, 16)),
    "best_fit_disagrees": lambda s: with_arm(s, 1, train_loss=0.39),
    "full_fits_better": lambda s: with_arm(s, 0, train_loss=0.451, train_loss_smoothed=0.47),
    "full_needs_accumulation": lambda s: replace(s, full_needs_accumulation=4),
    "not_alike": lambda s: with_arm(s, 1, facts=facts(base_model__digest="other")),
    "rates_not_tuned": lambda s: with_arm(s, 1, vit_lr=2e-4),
    "gates": lambda s: with_arm(s, 1, gate=frozenset({"passed", ""})),
    "f1_disagrees": lambda s: with_arm(s, 2, f1=0.7),
    "smoothing": lambda s: with_arm(s, 1, eval_loss=0.53),
    "does_not_look": lambda s: with_arm(s, 1, vision_gain=0.004),
    "rate_at_the_edge": lambda s: swept(s, (1e-4, 2e-4, 3e-4)),
    "gap_under_augmentation": lambda s: with_arm(s, 2, augmentation="clean"),
}


def swept(subject: Subject, rates: tuple[float, ...]) -> Subject:
    """All arms alike but for the learning rate, the winner's first."""
    arms = [
        replace(arm, blocks="all", method="lora", vit_lr=rate) for arm, rate in zip(subject.arms, rates, strict=True)
    ]
    return replace(subject, arms=arms, full_fits_better=False)


def test_nothing_is_said_of_a_sound_report() -> None:
    """No false alarm."""
    assert careful_reading(sound()) == []


def test_there_is_a_fault_for_every_check() -> None:
    """A check that is never seen to find anything would be none."""
    assert set(PLANTED) == set(CHECKS)


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(check: str) -> None:
    """No miss, no false alarm."""
    assert {finding.check for finding in careful_reading(PLANTED[check](sound()))} == {check}


def test_over_all_synthetic_reports_none_is_missed_and_no_alarm_is_false() -> None:
    """Counted: a fault planted in each of so many reports, and one without any."""
    reports = {check: plant(sound()) for check, plant in PLANTED.items()} | {"": sound()}
    found = {check: {finding.check for finding in careful_reading(report)} for check, report in reports.items()}
    missed = sum(check not in of_report for check, of_report in found.items() if check)
    false = sum(len(of_report - {check}) for check, of_report in found.items())
    assert (len(reports) >= 10, missed, false) == (True, 0, 0)


@pytest.mark.parametrize(
    "pair", [("one_seed", "gates"), ("overfitting", "f1_disagrees"), ("not_alike", "does_not_look")]
)
def test_two_faults_are_both_found(pair: tuple[str, str]) -> None:
    """One does not hide the other."""
    assert {f.check for f in careful_reading(PLANTED[pair[1]](PLANTED[pair[0]](sound())))} == {*pair}


def test_a_winner_inside_the_swept_range_and_equal_tries_are_no_finding() -> None:
    """Two kinds of arms, two rates each: tuned equally; of three rates the middle one wins."""
    assert careful_reading(swept(sound(), (2e-4, 1e-4, 3e-4))) == []
    two = replace(
        sound(), arms=[*sound().arms[:2], *(replace(arm, name=arm.name + "2", vit_lr=2e-4) for arm in sound().arms[:2])]
    )
    assert "rates_not_tuned" not in {finding.check for finding in careful_reading(two)}


@pytest.mark.parametrize(("by", "told"), [("eval/loss_smoothed", True), ("eval/loss", False)])
def test_the_recorded_arms_should_not_be_ranked_by_the_smoothed_loss(by: str, told: bool) -> None:
    """all_full was evaluated half as often as the others: smoothing takes most of what it is ahead of last6_lora."""
    found = [reading for run in recorded.runs() if isinstance(reading := read(run, by, At(), {}), Reading)]
    assert ("smoothing" in {finding.check for finding in careful_reading(subject_of(rank(found, by, At())))}) == told


def test_what_is_not_known_is_not_spoken_of() -> None:
    """Arms of which only the loss is known: one seed each, and no more can be said."""
    found = careful_reading(Subject([Arm("a", eval_loss=0.5), Arm("b", eval_loss=0.6)]))
    assert [finding.check for finding in found] == ["one_seed"]


def augmented(*modes: str) -> str:
    """What is said of the gaps of arms with these modes, the first the winner's."""
    arms = [replace(arm, augmentation=mode) for arm, mode in zip(sound().arms, modes, strict=True)]
    return " ".join(finding.text for finding in careful_reading(replace(sound(), arms=arms)))


def test_gaps_of_arms_that_were_augmented_otherwise_are_said_not_to_be_comparable() -> None:
    """Only where modes differ; the clean gap stays comparable; `off` is not augmented at all."""
    text = augmented("clean", "published_noisy", "clean")
    assert "first 0.1000, second 0.1000" in text and "clean: first, third; published_noisy: second" in text
    assert (
        "train loss and generalization_gap cannot be compared" in text and "generalization_gap_clean and eval" in text
    )
    assert "off: first" in augmented("off", "clean", "clean")
    assert "first 0.1000" in augmented("clean", "clean", "clean")
    assert "compared" not in augmented("clean", "clean", "clean")
    assert augmented("off", "off", "off") == ""


@pytest.mark.parametrize(
    ("params", "mode"),
    [
        ({}, "off"),
        ({"custom.augmentation.mode": "off", "custom.augmentation.enabled": "false"}, "off"),
        ({"custom.augmentation.mode": "published_noisy", "custom.augmentation.enabled": "true"}, "published_noisy"),
        ({"custom.augmentation.enabled": "true"}, "clean"),
        ({"custom.augmentation.enabled": "True", "custom.augmentation.mode": "null"}, "clean"),
        ({"custom.augmentation.enabled": "false"}, "off"),
    ],
)
def test_how_runs_were_augmented_is_read_from_their_mode(params: dict[str, str], mode: str) -> None:
    """Of older runs, from the switch."""
    one = read(a_run(params=params), "eval/loss", At(), {})
    assert isinstance(one, Reading)
    assert subject_of(rank([one], "eval/loss", At())).arms[0].augmentation == mode


def test_runs_are_read_as_reports_are() -> None:
    """A ranking of runs becomes a subject: seeds counted, tags and params taken over."""
    subject = subject_of(rank(readings({"a": [0.5, 0.6], "b": [0.7, 0.8]}), "eval/loss", At()))
    assert [(arm.name, arm.n_seeds, round(arm.eval_loss, 3)) for arm in subject.arms] == [
        ("a", 2, 0.55),
        ("b", 2, 0.75),
    ]
    assert subject.arms[0].facts["data.train_digest"] == {"d"}
    assert careful_reading(subject) == []

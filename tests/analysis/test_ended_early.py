"""Arms that halving has ended: named with the reason, and what is left is told apart from those that were behind."""

import pytest

from analysis.advice import next_steps, recommendation
from analysis.champion import promote
from analysis.ended_early import ended_early
from analysis.ranking import At, Ranking, Reading, rank, read, why_excluded
from analysis.runs import PARENT
from analysis.verdict import verdict
from tests.analysis.test_ranking import LOSS, run
from trainer.errors import UserError


def cell(arm: str) -> dict[str, str]:
    """Depth and method of an arm that is named by them, such as last6_lora."""
    depth, _, method = arm.partition("_")
    blocks = {"all": "all", "last6": "last-6"}.get(depth, "")
    return {"strategy.vision.blocks": blocks, "strategy.vision.method": method} if method else {}


def halved(*left: str, parent: str = "p", **ended: str) -> Ranking:
    """Three seeds of every arm: those of `left` finished, the others with why they were ended, below one parent run."""
    finished = [
        run(arm, seed, 0.5 + seed / 1000, tags={PARENT: "p"}, params=cell(arm)) for arm in left for seed in (1, 2, 3)
    ]
    stopped = [
        run(arm, seed, status="KILLED", tags={PARENT: parent, "halving": f"{why} at 518 samples"}, params=cell(arm))
        for arm, why in ended.items()
        for seed in (1, 2, 3)
    ]
    readings = [found for each in finished if isinstance(found := read(each, LOSS, At(), {}), Reading)]
    return rank(readings, LOSS, At(), [(each, str(why_excluded(each))) for each in stopped])


def test_the_verdict_names_them_and_why_they_were_ended() -> None:
    """Behind and equivalent apart; beside a comparison of those that are left."""
    lines = verdict(halved("a", b="behind", c="equivalent", d="behind"))
    assert lines == [
        "a is the only arm that was trained to its end.",
        "Ended early by halving, behind by more than the margin: b at 518 samples, d at 518 samples.",
        "Ended early by halving, within the margin of the leader: c at 518 samples.",
    ]
    assert verdict(halved("a", "b", c="behind"))[-1].endswith("behind by more than the margin: c at 518 samples.")


def test_arms_of_another_comparison_are_not_among_them() -> None:
    """They were held against others."""
    assert ended_early(halved("a", b="behind", parent="another")) == []
    assert verdict(halved("a", b="behind", parent="another")) == ["One arm only: there is nothing to compare it with."]


@pytest.mark.parametrize(("why", "confidence"), [("behind", "moderate"), ("equivalent", "low")])
def test_how_sure_it_is(why: str, confidence: str) -> None:
    """Never high: curves can cross."""
    found = recommendation(halved("a", b=why), [])
    assert found.confidence == confidence and "assumption" in found.why[-1]


@pytest.mark.parametrize(
    ("arms", "lacking"), [("all_full", []), ("last6_full", ["last-6 trained by lora", "all trained by full"])]
)
def test_what_was_ended_is_not_asked_to_be_run(arms: str, lacking: list[str]) -> None:
    """A cell of the 2x2 of depth and method that no arm had is."""
    found = [step.why for step in next_steps(halved("all_lora", **{arms: "behind"}), []) if "lacks" in step.why]
    assert len(found) == len(lacking) and all(any(cell in why for why in found) for cell in lacking)


class Empty:
    """A store in which no run has artifacts."""

    def artifact_json(self, run_id: str, name: str) -> None:
        """Nothing."""


def test_the_last_one_is_promoted_where_all_others_were_behind() -> None:
    """What is missing then is a checkpoint; where one was as good as the leader, a winner is."""
    with pytest.raises(UserError, match="no checkpoint"):
        promote(Empty(), halved("a", b="behind"), "m", "champion", anyway=False)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="within the margin of the leader: c"):
        promote(Empty(), halved("a", b="behind", c="equivalent"), "m", "champion", anyway=False)  # type: ignore[arg-type]

"""The course of a comparison with stand-ins for its runs: what is run, what is not run again, and what is told."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.running import runs_in
from tests.trainer.standing_in import behave, stand_in, started
from trainer import names
from trainer.compare import conclusion, course, stage
from trainer.compare.arms import enter, parse_arms
from trainer.compare.asked import Asked
from trainer.compare.children import standing
from trainer.compare.stage import Failed
from trainer.errors import ConfigError
from trainer.runs import SPOOL, RunFolder, read_facts
from trainer.spool import entries
from trainer.tracking import reach_store


@pytest.fixture(autouse=True)
def analysis(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The analysis and the delivery of runs that MLflow has never seen are left out: which of them were called."""
    called: list[str] = []

    def rank(of: Any) -> str:
        called.append("rank")
        (of.path / conclusion.RANKING).write_text("the ranking\n")
        return "the ranking\n"

    def report(of: Any) -> bool:
        called.append("report")
        return True

    monkeypatch.setattr(conclusion, "rank", rank)
    monkeypatch.setattr(conclusion, "report", report)
    monkeypatch.setattr(conclusion, "deliver", lambda runs: [])
    return called


def asked(strategies: str = "a=last6_lora,b=last6_lora", seeds: Sequence[int] = (17, 18), **more: Any) -> Asked:
    """A comparison, two runs at once."""
    arms = enter(parse_arms(strategies), seeds[0], None, {})
    return Asked(arms, tuple(seeds), None, {}, Path("output"), **{"jobs": 2, **more})


def compare(of: Asked) -> Path:
    """To its end."""
    return course.compare(of, reach_store())


def parent(store: str) -> Run:
    """The one run of the comparison; stand-ins make none."""
    (run,) = runs_in(store)
    return run


def text(store: str, artifact: str) -> str:
    """An artifact of the parent."""
    return Path(MlflowClient(store).download_artifacts(parent(store).info.run_id, artifact)).read_text()


# --- to the end, once ---------------------------------------------------------------------------------------------


def test_every_arm_is_run_on_every_seed_and_never_again(
    store: str, monkeypatch: pytest.MonkeyPatch, analysis: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds one after the other, so that what is there early can be compared; the same command only tells."""
    stand_in(monkeypatch)
    folder = compare(asked())
    assert sorted(started()) == ["a-seed17 end", "a-seed18 end", "b-seed17 end", "b-seed18 end"]
    assert {line.split()[0] for line in started()[:2]} == {"a-seed17", "b-seed17"}
    assert analysis == ["rank", "report"]
    assert capsys.readouterr().out == "the ranking\n"
    run = parent(store)
    assert run.info.status == "FINISHED" and run.info.run_name == "comparison of a, b"
    assert run.data.tags[names.TAG_ROLE] == "parent" and names.TAG_STRATEGY not in run.data.tags
    assert run.data.params["seeds"] == "17,18"
    assert "Hand-set" in run.data.tags[names.TAG_NOTE]

    assert compare(asked()) == folder
    assert len(started()) == 4 and analysis == ["rank", "report"]
    assert capsys.readouterr().out == "the ranking\n"
    assert parent(store).info.run_id == run.info.run_id


def test_other_seeds_arms_or_settings_are_another_comparison(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many runs go at once is no part of it."""
    stand_in(monkeypatch)
    folder = compare(asked(seeds=[17]))
    assert compare(asked(seeds=[17], jobs=1)) == folder
    assert compare(asked("a=last6_lora,b=last6_full", seeds=[17])) != folder
    assert asked(seeds=[18]).identity() != asked(seeds=[17]).identity() != asked(seeds=[17], tune=3).identity()


def test_what_fails_is_told_at_the_end_and_tried_again_by_the_same_command(
    store: str, monkeypatch: pytest.MonkeyPatch, analysis: list[str]
) -> None:
    """The rest is run to its end; the comparison stays open, with its own run of MLflow."""
    stand_in(monkeypatch, **{"b-seed17": {"status": 1}})
    with pytest.raises(Failed) as failed:
        compare(asked())
    told = str(failed.value)
    assert "1 of 4 runs failed" in told and "b-seed17: status 1" in told and "error: told to fail" in told
    assert "b-seed17/log.txt" in told
    assert len(started()) == 4 and analysis == ["rank"]
    before = parent(store)
    assert before.info.status == "FAILED"

    behave()
    compare(asked())
    assert started()[4:] == ["b-seed17 end"]
    assert analysis == ["rank", "rank", "report"]
    assert (parent(store).info.run_id, parent(store).info.status) == (before.info.run_id, "FINISHED")


def test_an_interrupted_comparison_goes_on_in_the_same_parent(
    store: str, monkeypatch: pytest.MonkeyPatch, analysis: list[str]
) -> None:
    """KILLED in between; runs that were over are not run again."""
    stand_in(monkeypatch)

    def interrupt(jobs: Any, room: Any, board: Any) -> None:
        real(jobs[:1], room, board)
        raise KeyboardInterrupt

    real = stage.run_all
    with monkeypatch.context() as patched:
        patched.setattr(stage, "run_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(asked())
    before = parent(store)
    assert (before.info.status, started()) == ("KILLED", ["a-seed17 end"])
    folder = compare(asked())
    assert parent(store).info.run_id == before.info.run_id
    assert sorted(started()) == ["a-seed17 end", "a-seed18 end", "b-seed17 end", "b-seed18 end"]
    assert read_facts(folder)["state"] == "over"


def test_a_report_that_cannot_be_written_leaves_the_comparison_open(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command writes it, and runs nothing."""
    stand_in(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(conclusion, "report", lambda of: False)
        with pytest.raises(Failed, match="report"):
            compare(asked(seeds=[17]))
    compare(asked(seeds=[17]))
    assert len(started()) == 2


def test_arms_that_have_not_seen_the_same_batches_are_told(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the digests that their runs carry."""
    other = {"params": {names.TAG_ORDER_DIGEST: "b"}}
    stand_in(monkeypatch, all={"params": {names.TAG_ORDER_DIGEST: "a"}}, **{"b-seed18": other})
    compare(asked())
    note = parent(store).data.tags[names.TAG_NOTE]
    assert "seed 18: not the same batches for all arms: a | b" in note and "seed 17: not" not in note


# --- tuned alike --------------------------------------------------------------------------------------------------


def test_each_arm_is_trained_at_the_best_of_as_many_rates_on_other_seeds(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm without vision tries the aligner's; a rate that drives training out of its numbers is no good."""
    best = {"last6_lora": {"by_rate": {"0.00024": -0.1}}, "frozen_vision-x2": {"status": 3}}
    stand_in(monkeypatch, **best, frozen_vision={"by_rate": {"5e-05": -0.2}})
    folder = compare(asked("last6_lora,frozen_vision", [17], tune=3))
    trials = [f"{arm}-x{factor} end" for arm in ("last6_lora", "frozen_vision") for factor in ("0.5", "1", "2")]
    assert sorted(started()[:6]) == sorted(trials) and len(started()) == 8
    tried = read_facts(folder)["rates_tried"]
    assert {arm: list(losses) for arm, losses in tried.items()} == {
        "last6_lora": ["6e-05", "0.00012", "0.00024"], "frozen_vision": ["5e-05", "0.0001", "0.0002"],
    }  # fmt: skip
    assert tried["frozen_vision"]["0.0002"] == float("inf")
    note = parent(store).data.tags[names.TAG_NOTE]
    assert "Tuned" in note and "Hand-set" not in note
    assert "`training.vit_lr=0.00024`" in note and "`training.aligner_lr=5e-05`" in note and "seed 18 in 0.25" in note


def test_a_trial_that_fails_otherwise_ends_the_comparison_before_the_arms_begin(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm with fewer trials than the others would not be tuned alike."""
    stand_in(monkeypatch, **{"b-x1": {"status": 1}})
    with pytest.raises(Failed, match="b-x1"):
        compare(asked(seeds=[17], tune=3))
    assert len(started()) == 6
    behave()
    compare(asked(seeds=[17], tune=3))
    assert started()[6] == "b-x1 end" and len(started()) == 7 + 2


# --- decided sooner -----------------------------------------------------------------------------------------------

HALVING = {"policy": "halving", "seeds": [17, 18, 19]}
WORSE = {"b": {"loss": 1.2}}
SCATTER = {"by_seed": {"17": 0.002, "18": -0.001, "19": -0.001}}


@pytest.fixture
def known_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is read to find how long runs are."""
    monkeypatch.setattr("trainer.compare.rungs.length_of", lambda entered: (90, 900, 100))


def test_an_arm_that_is_far_behind_is_ended_at_a_rung_and_its_runs_say_why(
    store: str, monkeypatch: pytest.MonkeyPatch, known_lengths: None
) -> None:
    """Its checkpoints stay; the others go on, and every number is on the parent."""
    stand_in(monkeypatch, all=SCATTER, **WORSE)
    folder = compare(asked("a=last6_lora,b=last6_lora", **HALVING))
    assert {line for line in started() if line.startswith("b")} == {f"b-seed{seed} 200" for seed in (17, 18, 19)}
    assert {line for line in started()[6:]} == {f"a-seed{seed} end" for seed in (17, 18, 19)}
    for seed in (17, 18, 19):
        now = standing(folder / "arms" / f"b-seed{seed}")
        assert (now.state, now.evaluations[-1].samples) == ("stopped", 200)
        assert now.path is not None
        tags = [e.body["values"] for e in entries(now.path / SPOOL) if e.kind == "tags"]
        assert tags == [{names.TAG_HALVING: "behind at 200 samples", names.TAG_STOPPED_EARLY: "step 20"}]
    told = json.loads(text(store, "halving.json"))
    assert (told["rungs"][0]["samples"], told["every"], told["margin"]) == (200, 100, 0.01)
    verdicts = {one["arm"]: one["verdict"] for one in told["rungs"][0]["decisions"]}
    assert verdicts == {"a": "leader", "b": "behind"} and len(told["rungs"]) == 1
    assert told["share_of_full"] == pytest.approx((1 + 2 / 9) / 2)
    tags = parent(store).data.tags
    assert tags[names.TAG_HALVING] == "1 of 2 arms ended early"
    assert "| b | " in tags[names.TAG_NOTE] and "behind" in tags[names.TAG_NOTE]


def test_a_halving_that_was_interrupted_after_a_decision_keeps_it(
    store: str, monkeypatch: pytest.MonkeyPatch, known_lengths: None
) -> None:
    """What was decided is not decided again, whatever the losses are by then; no run is started twice."""
    stand_in(monkeypatch, all=SCATTER, **WORSE)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.compare.rungs._end_stopped", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(asked(**HALVING))
    assert len(started()) == 6
    folder = compare(asked(**HALVING))
    assert sorted(started()[6:]) == [f"a-seed{seed} end" for seed in (17, 18, 19)]
    assert {standing(folder / "arms" / f"b-seed{seed}").state for seed in (17, 18, 19)} == {"stopped"}


@pytest.mark.parametrize("refused", ["threads", "stopped"])
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(
    store: str, monkeypatch: pytest.MonkeyPatch, known_lengths: None, refused: str
) -> None:
    """Where the comparison notes something, and where it closes the run of an arm that was ended."""
    stand_in(monkeypatch, all=SCATTER, **WORSE)
    write = RunFolder.write

    def full(folder: RunFolder, **facts: Any) -> None:
        if refused in (*facts, facts.get("state")):
            raise OSError(28, "No space left on device")
        write(folder, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            compare(asked(**HALVING))
    folder = compare(asked(**HALVING))
    assert {standing(folder / "arms" / f"b-seed{seed}").state for seed in (17, 18, 19)} == {"stopped"}


@pytest.mark.parametrize("told", [conclusion.rank, conclusion.report])
def test_a_conclusion_that_the_disk_does_not_take_is_one_message(tmp_path: Path, told: Callable[[Any], object]) -> None:
    """Not even its log, here."""
    with pytest.raises(ConfigError, match="a folder that can be written"):
        told(SimpleNamespace(path=tmp_path / "gone", run_id="r"))


def test_an_arm_of_which_a_run_has_failed_is_not_judged(
    store: str, monkeypatch: pytest.MonkeyPatch, known_lengths: None
) -> None:
    """It goes on, the failure is told at the end, and the same command brings it there."""
    stand_in(monkeypatch, all=SCATTER, **WORSE, **{"b-seed18": {"status": 1}})
    with pytest.raises(Failed, match="b-seed18"):
        compare(asked(**HALVING))
    assert "b-seed17 end" in started()
    behave(all=SCATTER, **WORSE)
    compare(asked(**HALVING))
    assert started()[-1] == "b-seed18 end"

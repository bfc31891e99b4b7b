"""docs/halving.md says what rule, recorded runs and simulation say; and what makes its tables, on made-up runs."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from benchmarks import deciding_sooner as page
from benchmarks.rung_replay import Evaluation, Recording, aligned, fresh, replay
from benchmarks.wrong_stops import CASES, rates
from tests.running import empty_store, without_mlflow_variables
from trainer import names
from trainer.halving import Rule

PAGE = page.PAGE.read_text(encoding="utf-8")


def test_every_table_of_the_page_is_made_from_its_results() -> None:
    """`python -m benchmarks.deciding_sooner tables` would change nothing."""
    assert page.filled(PAGE) == PAGE
    assert set(re.findall(r"<!-- (\w+) -->\n", PAGE)) - {"end"} == set(page.TABLES)


def test_the_simulation_is_one_of_the_rule_that_is_in_force() -> None:
    """Whoever changes a threshold simulates anew; every case is there."""
    told = json.loads(page.SIMULATION.read_text(encoding="utf-8"))
    assert told["rule"] == json.loads(json.dumps(asdict(Rule())))
    assert {row["case"] for row in told["rates"]} == {case.name for case in CASES}


def test_the_simulation_errs_about_as_often_as_was_asked_for() -> None:
    """Two arms, one at the margin: the case in which all of the error is spent on one arm; 300 draws, 5 % of them."""
    assert rates(CASES[4], 0.75, Rule(), repetitions=300).wrong < 0.1
    far = rates(CASES[2], 0.05, Rule(), repetitions=20)
    assert CASES[2].behind == (0, 1, 1, 1, 1) and 0 <= far.wrong <= 0.3
    clear = rates(CASES[3], 0.1, Rule(), repetitions=20)
    assert (clear.wrong, clear.stopped, clear.regret) == (0.0, 1.0, 0.0)


# --- a replay on curves that were made up ---------------------------------------------------------------------------


def run(*losses: float, every: float = 100, seconds: float = 10) -> list[Evaluation]:
    """Evaluated from step 0 on."""
    return [Evaluation(every * i, loss, seconds * (i + 1)) for i, loss in enumerate(losses)]


def recording(**curves: list[float]) -> Recording:
    """Three seeds, each a little higher than the one before, and a little more noise where evaluations are even."""
    shifts = {1: 0.0, 2: 0.002, 3: 0.004}
    made = {
        arm: {
            seed: run(*(loss + shift + 0.0002 * ((seed * i + len(arm)) % 3) for i, loss in enumerate(losses)))
            for seed, shift in shifts.items()
        }
        for arm, losses in curves.items()
    }
    return Recording("made up", made)


FALLING = [1.0, 0.9, 0.8, 0.75, 0.7, 0.68, 0.66, 0.65, 0.64]


def test_a_replay_counts_what_was_trained_until_the_stop() -> None:
    """Eight evaluations after the base model's: one of two arms is stopped at the second, for 3 of 9 x 10 seconds."""
    slower = [loss + 0.2 for loss in FALLING]
    found = replay(recording(good=FALLING, worse=slower), (1, 2, 3), Rule())
    assert (found.winner, found.full_winner, found.regret, found.premature) == ("good", "good", 0.0, ())
    assert found.stopped(0) == "worse (behind)" and set(found.decisions) == {0}
    assert (found.seconds, found.samples) == (pytest.approx((3 + 9) / 18), pytest.approx((2 + 8) / 16))


def test_a_curve_that_crosses_late_is_counted_as_an_error() -> None:
    """Behind at the first rung, ahead at the end: another winner, a regret, a stop that the end does not bear out."""
    late = [1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5]
    found = replay(recording(early=FALLING, late=late), (1, 2, 3), Rule())
    assert (found.winner, found.full_winner, found.premature) == ("early", "late", ("late",))
    assert found.regret == pytest.approx(0.14 / 0.5, rel=0.02) and found.distinguishable


def test_only_evaluations_after_the_same_samples_are_compared() -> None:
    """An arm that is evaluated half as often has every second of the others' evaluations, and no more."""
    curves = {"fine": {1: run(*range(9))}, "coarse": {1: run(*range(5), every=199)}}
    (fine,), (coarse,) = ([*of.values()] for of in aligned(curves).values())
    assert [one.samples for one in fine] == [one.samples for one in coarse] == [0, 199, 398, 597, 796]
    assert [one.loss for one in fine] == [0, 2, 4, 6, 8] and fine[1].seconds == 30


# --- a recording ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(store, parent) of a comparison: two arms on two seeds, a trial beside them, a run of somebody else."""
    store = empty_store(tmp_path_factory.mktemp("compared"))
    client = MlflowClient(store)
    experiment = client.create_experiment("e")
    parent = client.create_run(experiment).info.run_id
    whole = [(arm, seed, parent, "arm") for arm in "ab" for seed in (1, 2)]
    whole += [(arm, 3, "later", "arm") for arm in "ab"]
    for arm, seed, below, role in [*whole, ("a", 9, parent, "trial"), ("a", 1, "other", "arm")]:
        tags = {names.TAG_STRATEGY: "s", names.TAG_SEED: str(seed), names.TAG_GATE: "passed", "comparison.arm": arm}
        tags |= {"comparison.role": role, "mlflow.parentRunId": below}
        made = client.create_run(experiment, tags=tags).info.run_id
        client.log_param(made, "training.eval_samples", 40)
        for step in (0, 4, 8):
            row = {names.EVAL_LOSS: 1.0 - step / 16, names.SAMPLES_SEEN: 10.0 * step, names.TRAIN_SECONDS: 2.0 * step}
            for metric, value in {**row, names.EVALUATION_SECONDS: 1.0 + step}.items():
                client.log_metric(made, metric, value, step=step)
        client.set_terminated(made)
    return store, parent


@pytest.fixture
def parent(compared: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The comparison's parent, with its store in the environment, while recordings go to `tmp_path`."""
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    with without_mlflow_variables():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", compared[0])
        yield compared[1]


def test_a_comparison_becomes_a_recording(parent: str, tmp_path: Path) -> None:
    """Its arms on its seeds, without what only tried a rate; as `fresh` reads it."""
    page.extract("first", [parent])
    (found,) = fresh(tmp_path)
    assert (found.name, found.groups(), found.every) == ("first", [(1, 2)], 40)
    assert [found.rung(share, 80) for share in (0.2, 0.4, 1)] == [80, 80, 80]  # two evaluations at the least
    assert {arm: sorted(of) for arm, of in found.curves.items()} == {"a": [1, 2], "b": [1, 2]}
    assert found.curves["b"][2] == [Evaluation(0, 1.0, 1.0), Evaluation(40, 0.75, 13.0), Evaluation(80, 0.5, 25.0)]
    assert len(pd.read_parquet(tmp_path / "first.parquet")) == 12


def test_seeds_that_were_added_later_belong_to_the_same_recording(parent: str, tmp_path: Path) -> None:
    """Runs below two parents; a run that an arm has in both is refused, since only one of them could be taken."""
    page.extract("first", [parent, "later"])
    (found,) = fresh(tmp_path)
    assert {arm: sorted(of) for arm, of in found.curves.items()} == {"a": [1, 2, 3], "b": [1, 2, 3]}
    with pytest.raises(SystemExit, match="one finished run for every arm and seed"):
        page.extract("first", [parent, "other"])


def test_what_is_not_whole_is_not_recorded(parent: str, tmp_path: Path) -> None:
    """Runs below nothing; and an arm that lacks a seed."""
    with pytest.raises(SystemExit, match="0 runs below nowhere"):
        page.extract("first", ["nowhere"])
    with pytest.raises(SystemExit, match="one finished run for every arm and seed"):
        page.extract("first", ["later", "other"])
    assert list(tmp_path.iterdir()) == []

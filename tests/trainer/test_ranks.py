"""`launch.nproc: auto`: how many ranks a machine gives, what they share, and what a run keeps when it goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer import launch, names, ranks
from trainer.budget import step_plan_from
from trainer.config.load import load
from trainer.config.resolved import Resolved
from trainer.data.packing import Fixed
from trainer.errors import ConfigError
from trainer.runs import Identity, new_run

ACCUMULATION, NPROC = "training.gradient_accumulation_steps", "launch.nproc"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own, in an empty folder, with a store that has its default name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_STARTED_AS_RANK", False)
    for variable in ("MLFLOW_TRACKING_URI", "OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, *, cores: int = 2, gpus: int = 0) -> None:
    """What this machine has."""
    monkeypatch.setattr(launch, "cores", lambda: cores)
    monkeypatch.setattr(launch, "may_have_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def arm(accumulation: int = 2, nproc: str = "auto", **overrides: str) -> Resolved:
    """A strategy with so many micro-batches in a step."""
    return load("last6_lora", overrides={ACCUMULATION: str(accumulation), NPROC: nproc} | overrides)


def layout(resolved: Resolved) -> tuple[int, int]:
    """(ranks, micro-batches of each in a step)."""
    nproc = resolved.config.launch.nproc
    assert nproc != "auto"
    return nproc, resolved.config.training.gradient_accumulation_steps


# --- a new run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "cores", "expected"),
    [
        (2, 1, (1, 2)), (2, 2, (2, 1)), (2, 64, (2, 1)), (4, 2, (2, 2)), (4, 3, (2, 2)), (4, 4, (4, 1)), (1, 8, (1, 1)),
        (3, 2, (1, 3)), (6, 4, (3, 2)), (7, 6, (1, 7)), (64, 64, (8, 8)), (36, 8, (6, 6)), (10**9, 3, (2, 5 * 10**8)),
    ],
)  # fmt: skip
def test_as_many_ranks_as_there_are_cores_for_and_as_share_a_step_evenly(
    accumulation: int, cores: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 8 on cores; what they accumulate together is what was asked for."""
    machine(monkeypatch, cores=cores)
    assert layout(ranks.settled(arm(accumulation))) == expected


@pytest.mark.parametrize(
    ("accumulation", "n_gpus", "expected"), [(2, 1, (1, 2)), (2, 2, (2, 1)), (4, 3, (2, 2)), (16, 16, (16, 1))]
)
def test_where_there_are_gpus_they_count_and_cores_do_not(
    accumulation: int, n_gpus: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank for each that is visible."""
    machine(monkeypatch, cores=8, gpus=n_gpus)
    assert layout(ranks.settled(arm(accumulation))) == expected


def test_of_gpus_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` that is written shares a step among them; without GPUs here, naming some changes nothing."""
    machine(monkeypatch, cores=2, gpus=8)
    assert layout(ranks.settled(arm(8, gpus="0,1,2,3"))) == (4, 2)
    machine(monkeypatch, cores=2)
    assert layout(ranks.settled(arm(8, gpus="0,1,2,3"))) == (2, 4)


@pytest.mark.parametrize("nproc", ["1", "2", "3"])
def test_a_number_is_left_alone(nproc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks then multiply the batch, whatever the machine has."""
    machine(monkeypatch, cores=64, gpus=8)
    resolved = arm(4, nproc)
    assert ranks.settled(resolved, "auto") is resolved and layout(resolved) == (int(nproc), 4)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8])
def test_steps_hold_the_same_packs_on_every_machine(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of every step, and the number of steps, are those of one rank."""
    machine(monkeypatch, cores=cores)
    samples = Fixed(tuple(range(40, 140)))
    shared, alone = (step_plan_from(r.config, samples) for r in (ranks.settled(arm(4)), arm(4, "1")))
    assert shared.steps_in_epoch(0) == alone.steps_in_epoch(0)
    for _, ours, theirs in zip(range(30), shared.steps(), alone.steps(), strict=False):
        assert sorted(i for micro in ours for rank in micro for i in rank) == sorted(
            i for micro in theirs for rank in micro for i in rank
        )


def test_what_was_chosen_shows_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both origins, in one line for `plan`, and as numbers in params and in the file that is kept."""
    machine(monkeypatch, cores=8)
    settled = ranks.settled(arm(2))
    assert settled.chosen == "2 ranks of 4 threads, chosen for this machine; accumulation 2 -> 1 each"
    assert settled.origins[NPROC] == "auto (-P), chosen for this machine"
    assert settled.origins[ACCUMULATION] == "2 (-P) / 2 ranks"
    assert (settled.params()[NPROC], settled.params()[ACCUMULATION]) == ("2", "1")
    assert "nproc: 2" in settled.to_yaml() and "gradient_accumulation_steps: 1" in settled.to_yaml()
    machine(monkeypatch, cores=1)
    assert ranks.settled(arm(2)).chosen == "1 rank of 1 thread, chosen for this machine"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ranks.settled(arm(2)).chosen.startswith("1 rank of 3 threads")


def test_a_configuration_that_nobody_has_settled_is_one_rank() -> None:
    """As a process is that calls `run` itself."""
    assert arm().config.launch.ranks == 1 and step_plan_from(arm().config, Fixed((1, 2))).ranks == 1


# --- cores and threads -------------------------------------------------------------------------------------------


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Linux says which they are; else every CPU is a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    monkeypatch.setattr(launch, "_SIBLINGS", f"{tmp_path}/{{}}")
    assert launch.cores() == 4
    for cpu, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 5: "1,5"}.items():
        (tmp_path / str(cpu)).write_text(siblings + "\n")
    assert launch.cores() == 3
    assert [launch.threads(n) for n in (1, 2, 3, 8)] == [3, 1, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert launch.threads(3) == 2


# --- ranks that were started -------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [1, 2, 4])
def test_ranks_are_as_many_as_were_started(started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All come to the same, whatever cores they see, and whatever lies in the output folder."""
    machine(monkeypatch, cores=64)
    monkeypatch.setattr(launch, "_STARTED_AS_RANK", True)
    monkeypatch.setenv("WORLD_SIZE", str(started))
    assert layout(ranks.settled(arm(8), "auto")) == (started, 8 // started)


def test_ranks_that_do_not_share_a_step_evenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another launcher: ours starts none such."""
    monkeypatch.setattr(launch, "_STARTED_AS_RANK", True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"(?s)-P launch\.nproc.*started 3 ranks.*share 4 micro.*launch\.nproc to 3"):
        ranks.settled(arm(4))


# --- a run that goes on ------------------------------------------------------------------------------------------


def interrupted(resolved: Resolved, **changes: str) -> Path:
    """The folder that a run of a configuration leaves when it is interrupted."""
    batch = resolved.config.training.per_device_train_batch_size * layout(resolved)[0] * layout(resolved)[1]
    rests = {names.TAG_STRATEGY: resolved.arm, names.EFFECTIVE_BATCH_PACKS: str(batch)}
    rests |= dict.fromkeys(names.DIGESTS, "a" * 32)
    store = f"sqlite:///{Path.cwd()}/mlflow.db"
    folder = new_run(Path("output"), Identity("r", {**resolved.params(), **rests, **changes}, store))
    folder.write(state="interrupted")
    folder.release()
    return folder.path


@pytest.mark.parametrize("cores_now", [1, 2, 3, 64])
@pytest.mark.parametrize("cores_before", [1, 2, 4])
def test_it_goes_on_with_the_ranks_it_had_on_another_machine_too(
    cores_before: int, cores_now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no sum is made in another order; a new run takes what the machine has."""
    machine(monkeypatch, cores=cores_before)
    before = ranks.settled(arm(4))
    home = interrupted(before)
    machine(monkeypatch, cores=cores_now)
    (home / "resume" / "step-2").mkdir(parents=True)
    for resume in ("auto", "", str(home), str(home / "resume" / "step-2")):
        now = ranks.settled(arm(4), resume)
        assert layout(now) == layout(before) and now.config == before.config, resume
        assert now.chosen.startswith(f"{cores_before} rank") and "as the run had before" in now.chosen
    new = ranks.settled(arm(4), "never")
    assert layout(new)[0] == min(4, 2 if cores_now == 3 else cores_now) and "chosen" in new.chosen


def test_with_a_number_it_goes_on_under_auto_and_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` that became 2, and 2 with half the accumulation, are one training; so is one rank, in another layout."""
    machine(monkeypatch, cores=2)
    auto, written, alone = ranks.settled(arm(2)), arm(1, "2"), arm(2, "1")
    assert auto.config == written.config and auto.params() == written.params()
    rests = {names.EFFECTIVE_BATCH_PACKS: "2"}
    one, two = (Identity("r", {**resolved.params(), **rests}, "s") for resolved in (alone, auto))
    assert two.differences(one.params) == {} and two.layout() != one.layout()
    interrupted(alone)
    assert layout(ranks.settled(arm(2), "auto")) == (1, 2)
    time.sleep(0.01)
    interrupted(written)
    assert layout(ranks.settled(arm(2), "auto")) == (2, 1)  # the newest


@pytest.mark.parametrize(
    "changes",
    [
        {"training.vit_lr": "2e-4"}, {names.TAG_STRATEGY: "another"}, {names.EFFECTIVE_BATCH_PACKS: "8"},
        {NPROC: "3"}, {NPROC: "0"}, {NPROC: "auto"}, {NPROC: "\u0662"}, {NPROC: "256"},
    ],
    ids=str,
)  # fmt: skip
def test_ranks_of_another_run_or_impossible_ones_are_not_taken(
    changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a folder says need not be sense: then the machine decides, and `begin` says what is wrong."""
    machine(monkeypatch, cores=1)
    interrupted(ranks.settled(arm(256)), **changes)
    machine(monkeypatch, cores=2)
    assert layout(ranks.settled(arm(256), "auto")) == (2, 128)
    assert layout(ranks.settled(arm(256), "nowhere")) == (2, 128)


def test_more_ranks_than_gpus_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not be started."""
    machine(monkeypatch, gpus=4)
    interrupted(ranks.settled(arm(4)))
    machine(monkeypatch, gpus=2)
    assert layout(ranks.settled(arm(4), "auto")) == (2, 2)
    machine(monkeypatch, cores=1)
    assert layout(ranks.settled(arm(4), "auto")) == (4, 1)


def test_a_store_of_another_name_holds_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `begin` sees it."""
    machine(monkeypatch, cores=1)
    interrupted(ranks.settled(arm(2)))
    machine(monkeypatch, cores=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert layout(ranks.settled(arm(2), "auto")) == (2, 1)


def test_it_is_looked_up_without_mlflow_and_transformers() -> None:
    """By the process that starts the ranks, which needs neither: they take seconds to import."""
    script = (
        "import sys; from trainer import ranks; from trainer.config.load import load\n"
        "settled = ranks.settled(load('last6_lora'), 'auto')\n"
        "assert settled.config.launch.nproc != 'auto'\n"
        "print(sorted({'mlflow', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""One rank, two ranks and ZeRO-2 are the same training: gradients of a step, updates, whole runs, and how runs end."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from tests.running import (
    ROOT,
    SMALL,
    empty_store,
    environment,
    flags,
    runs_in,
    start_trainer,
    trainer,
    wait_for,
)  # fmt: skip
from tests.server_process import free_port
from tests.step_on_ranks import RATE
from trainer import launch, names
from trainer.config.load import load

KINDS = [("plain", 2), ("zero", 1), ("zero", 2)]
IDS = ["two ranks", "ZeRO-2 on one rank", "ZeRO-2 on two ranks"]
Step = tuple[dict, dict[str, torch.Tensor]]  # type: ignore[type-arg]


@functools.cache
def step(kind: str, ranks: int, dtype: str, dropout: float = 0.0, again: int = 0, *, fused: bool = False) -> Step:
    """What one step on so many ranks gave: facts, and tensors `gradient/NAME` and `update/NAME`; `again` repeats it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "tests.step_on_ranks", folder, kind, dtype, str(dropout), *(["fused"] if fused else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment(None), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((Path(folder) / "step.json").read_text()), load_file(Path(folder) / "step.safetensors")


@pytest.mark.parametrize(("kind", "ranks"), KINDS, ids=IDS)
def test_loss_and_every_gradient_of_a_step_are_those_of_one_rank(kind: str, ranks: int) -> None:
    """In float32 at dropout 0: loss to 1e-6, every gradient to 1e-5 relative; one of four packs is silent."""
    (one, ours), (reference, expected) = step(kind, ranks, "float32"), step("plain", 1, "float32")
    assert one["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert (one["samples"], one["tokens"]) == (reference["samples"], reference["tokens"]) == (5, 73)
    assert sum(one["silent"]) == (ranks == 2)
    assert set(ours) == set(expected)
    for name in (name for name in expected if name.startswith("gradient/")):
        assert (ours[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 2), ("zero", 2)], ids=["two ranks", "ZeRO-2 on two ranks"])
def test_the_fused_pass_on_ranks_makes_the_step_of_the_plain_one(kind: str, ranks: int) -> None:
    """Loss to 1e-6, every gradient to 1e-5: a function of our own takes part in either exchange as any other does."""
    (one, ours), (reference, expected) = step(kind, ranks, "float32", fused=True), step("plain", 1, "float32")
    assert one["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert one["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert sum(one["silent"]) == 1
    for name in (name for name in expected if name.startswith("gradient/")):
        assert (ours[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("kind", "ranks"), KINDS, ids=IDS)
def test_norms_by_part_are_those_of_the_gradients(kind: str, ranks: int) -> None:
    """Of whole gradients before clipping, also where each rank holds a piece of them."""
    facts, tensors = step(kind, ranks, "float32")
    (reference, _) = step("plain", 1, "float32")
    squares = sum(float(g.double().square().sum()) for name, g in tensors.items() if name.startswith("gradient/"))
    assert facts["norms"]["total"] == pytest.approx(squares**0.5, rel=1e-6)
    assert facts["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert set(facts["norms"]) == {"vision", "aligner", "llm", "total"}


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 1), *KINDS], ids=["one rank", *IDS])
def test_an_update_of_1e_5_is_not_lost_on_a_bf16_base(kind: str, ranks: int) -> None:
    """AdamW's first update moves whatever has a gradient by the rate: in LoRA and in full copies it arrives whole.

    Every tensor's largest move is 1e-5; in bf16, weights of size 1 would stand still (their spacing is 8e-3).
    """
    _, tensors = step(kind, ranks, "bfloat16")
    for name, update in tensors.items():
        if name.startswith("update/") and tensors[name.replace("update/", "gradient/")].abs().max() > 1e-6:
            assert update.abs().max().item() == pytest.approx(RATE, rel=0.02), name  # float32 spacing at 1: 1.2e-7
    moved = {name.rpartition("/")[2] for name, update in tensors.items() if name.startswith("update/") and update.any()}
    assert any("lora_B" in name for name in moved) and any("modules_to_save" in name for name in moved)


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 2)], ids=["two ranks"])
def test_dropout_is_the_same_in_an_equal_layout(kind: str, ranks: int) -> None:
    """Two processes each time: every gradient bit-equal when repeated, and not that of dropout 0."""
    (_, first), (_, second) = (step(kind, ranks, "float32", 0.3, again) for again in (1, 2))
    (_, without) = step(kind, ranks, "float32")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], without[name]) for name in first)


LAYOUTS = {
    "plain": {"training.gradient_accumulation_steps": "2"},
    "auto": {"launch.nproc": "auto", "training.gradient_accumulation_steps": "2"},
    "two ranks": {"launch.nproc": "2", "training.gradient_accumulation_steps": "1"},
    "two hosts": {"launch.nproc": "auto", "training.gradient_accumulation_steps": "2"},
    "zero2": {"deepspeed.enabled": "true", "training.gradient_accumulation_steps": "2"},
    "zero2 on two ranks": {
        "deepspeed.enabled": "true", "launch.nproc": "2", "training.gradient_accumulation_steps": "1",
    },
    "auto, zero2": {
        "deepspeed.enabled": "true", "launch.nproc": "auto", "training.gradient_accumulation_steps": "2",
    },
}  # fmt: skip


@functools.cache
def whole(layout: str) -> tuple[str, Run]:
    """A whole small run of last6_full, dropout 0, in one of the layouts, as a user starts it: its store and its run."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    store = empty_store(folder)
    settings = SMALL | {"training.logging_steps": "1", "tuner.lora_dropout": "0"} | LAYOUTS[layout]
    if layout == "two hosts":
        done = _on_two_hosts(folder, store, settings)
    else:
        done = trainer("run", "last6_full", *flags(settings), cwd=folder, store=store)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training gate") == 1  # one rank speaks
    (run,) = runs_in(store)
    return store, run


def _on_two_hosts(folder: Path, store: str, settings: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """The same command twice, as on two hosts: each in a folder of its own, under an address of its own."""
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    settings = settings | {"launch.hosts": str(folder / "hosts"), "launch.port": str(free_port())}
    homes = [folder / "first", folder / "second"]
    for home in homes:
        home.mkdir()
    commands = [("run", "last6_full", *flags(settings | {"launch.host_rank": str(rank)})) for rank in (0, 1)]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(
            lambda command, home: trainer(*command, cwd=home, store=store, timeout=900), commands, homes
        )
    assert second.returncode == first.returncode, second.stderr
    assert list(homes[0].glob("output/*/best")) and list(homes[1].iterdir()) == [] and second.stdout == ""
    return first


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_a_whole_run_gives_the_losses_of_the_plain_one(layout: str) -> None:
    """Every exact metric at every step to 1e-5: losses, gaps, norms by part; counters and learning rates equal."""
    (store, run), (plain_store, plain) = whole(layout), whole("plain")
    assert run.info.status == "FINISHED" and run.data.tags[names.TAG_GATE] == "passed"
    exact = [name for name in plain.data.metrics if names.metric(name).exact]
    assert set(exact) == {name for name in run.data.metrics if names.metric(name).exact}
    for name in exact:
        ours, theirs = (
            {m.step: m.value for m in MlflowClient(s).get_metric_history(r.info.run_id, name)}
            for s, r in ((store, run), (plain_store, plain))
        )
        # a difference of two losses is as exact as the losses: 1e-5 of about 1
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("auto")])
def test_auto_is_stored_as_the_numbers_that_it_became(layout: str) -> None:
    """One run, with the batch of one rank; its own configuration file, which says the same, trains the same."""
    (store, run), (_, plain) = whole(layout), whole("plain")
    ranks = min(2, launch.cores())
    numbers = ("launch.nproc", "training.gradient_accumulation_steps", names.EFFECTIVE_BATCH_PACKS)
    assert [plain.data.params[key] for key in numbers] == ["1", "2", "2"]
    assert [run.data.params[key] for key in numbers] == [str(ranks), str(2 // ranks), "2"]
    kept = MlflowClient(store).download_artifacts(run.info.run_id, names.ARTIFACT_CONFIG)
    assert load(kept).params().items() <= run.data.params.items()


def test_a_mistake_on_two_ranks_is_told_once(tmp_path: Path) -> None:
    """One message, status 2, nothing in the store."""
    two = flags(SMALL | {"launch.nproc": "2"})
    (tmp_path / "taken").write_text("")
    done = trainer("run", "last6_lora", *two, "--output_dir", "taken", cwd=tmp_path,
                   store=f"sqlite:///{tmp_path}/mlflow.db")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 4 and "taken" in done.stderr


def test_ranks_of_another_launcher_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    """The plan of the run, its batch and its steps are made for so many."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "trainer", "run", "frozen_vision", *flags(SMALL)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(empty_store(tmp_path)), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert done.stderr.count("a launcher has started 2 ranks") == 1
    assert "set launch.nproc to 2" in done.stderr


@pytest.mark.parametrize(("age", "said"), [(3600, "removed"), (5, "another process compiles")])
def test_a_lock_of_a_killed_compilation_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], age: float, said: str
) -> None:
    """Torch alone would wait for ever, without a word; an old one is removed."""
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    launch._tell_of_locks()
    told = capsys.readouterr().err
    assert said in told and str(lock) in told
    assert lock.exists() == (age < 600)


def test_ctrl_c_ends_all_ranks_and_closes_the_run_as_killed(tmp_path: Path) -> None:
    """Sent to the group, as a terminal does."""
    store = empty_store(tmp_path)
    endless = SMALL | {"training.max_steps": "100000", "launch.nproc": "2", "training.logging_steps": "1"}
    process = start_trainer("run", "frozen_vision", *flags(endless), cwd=tmp_path, store=store)
    wait_for(process, "step      2/100000  train")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(200) == 130
    (run,) = runs_in(store)
    assert run.info.status == "KILLED"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        time.sleep(0.2)
    assert not subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout


def test_a_hangup_ends_ranks_and_one_that_is_ignored_does_not(tmp_path: Path) -> None:
    """Under nohup a closed terminal must not end a run, on several ranks as on one."""
    store = empty_store(tmp_path)
    short = SMALL | {"launch.nproc": "2", "training.logging_steps": "1"}
    command = ["nohup", sys.executable, "-m", "trainer", "run", "frozen_vision", *flags(short)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(store), stdout=log, stderr=log, start_new_session=True
        )
        while "step 1/3  train" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    (run,) = runs_in(store)
    assert run.info.status == "FINISHED"


def test_ranks_that_are_killed_end_the_run_that_mlflow_made_and_keep_its_description(tmp_path: Path) -> None:
    """Out of memory, for instance: no rank could close the run, so whoever started the ranks does, as KILLED."""
    store = empty_store(tmp_path)
    client = MlflowClient(store)
    made = client.create_run(client.create_experiment("mine")).info.run_id
    endless = SMALL | {"training.max_steps": "100000", "launch.nproc": "2", "training.logging_steps": "1"}
    process = start_trainer("run", "frozen_vision", *flags(endless), cwd=tmp_path, store=store, MLFLOW_RUN_ID=made)
    wait_for(process, "step      2/100000  train")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for rank in ranks:
        os.kill(int(rank), signal.SIGKILL)
    assert process.wait(200) == 137
    run = client.get_run(made)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow.note.content"].startswith("**frozen_vision**")

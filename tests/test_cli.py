"""The command line as users meet it: mistakes end with one message, signals and crashes with a closed run."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from tests.running import ROOT, SMALL, empty_store, environment, flags, runs_in, start_trainer, trainer, wait_for
from trainer import __main__ as command_line
from trainer import names

PARTS_OF_A_MESSAGE = ("got:", "allowed:", "do:")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that was refused for the user's mistake."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in PARTS_OF_A_MESSAGE:
        assert part in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def bad_data(folder: Path) -> list[str]:
    """A training file with two broken lines, and the flags that name it."""
    (folder / "bad.jsonl").write_text('{"images": ["none.png"], "width": 32, "height": 32, "objects": []}\nnot json\n')
    return ["--train_jsonl", "bad.jsonl", "--val_jsonl", "bad.jsonl"]


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown configuration": (["last6_lroa"], ["last6_lroa", "did you mean last6_lora?"]),
    "unknown key": (
        ["last6_lora", "--training.lernin_rate", "1"],
        ["lernin_rate", "did you mean training.learning_rate?"],
    ),
    "wrong type": (
        ["last6_lora", "--training.eval_steps", "often"],
        ["-P training.eval_steps", "'often'", "whole number"],
    ),
    "blocks that the model does not have": (["last6_lora", "--strategy.vision.blocks", "18-30"], ["18-30", "24"]),
    "rank 0": (["last6_lora", "--tuner.lora_rank", "0"], ["tuner.lora_rank", "at least 1"]),
    "warm-up 2.0": (["last6_lora", "--training.warmup_ratio", "2.0"], ["training.warmup_ratio", "2.0", "at most 1"]),
    "data that is not there": (
        ["last6_lora", "--train_jsonl", "no.jsonl", "--val_jsonl", "no.jsonl"],
        ["custom.train_jsonl", "custom.val_jsonl", "no such file"],
    ),
    "unknown profile": (["last6_lora", "--profile", "pockt"], ["pockt", "did you mean pocket?"]),
    "unknown model": (["last6_lora", "--model", "./no/model"], ["./no/model", "no such model"]),
    "a DeepSpeed file that is not there": (
        ["last6_lora", "--deepspeed.enabled", "true", "--deepspeed.config", "zero3"],
        ["deepspeed.config", "zero2", "did you mean"],
    ),
    "a file store": (["last6_lora"], ["MLFLOW_TRACKING_URI", "file store"]),
    "an output folder that is a file": (["last6_lora", "--output_dir", "taken"], ["taken"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_status_2_and_leaves_the_store_untouched(mistake: str, tmp_path: Path) -> None:
    """Where, what was got, what is allowed, what to do; no traceback, no run, no file."""
    arguments, words = MISTAKES[mistake]
    (tmp_path / "taken").write_text("")
    store = "file:///nowhere" if mistake == "a file store" else f"sqlite:///{tmp_path}/mlflow.db"
    message = refused(trainer("run", *arguments, cwd=tmp_path, store=store))
    for word in words:
        assert word in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_bad_records_are_all_named_in_one_message(tmp_path: Path) -> None:
    """File and line of each, before anything is started."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    message = refused(trainer("run", "last6_lora", *bad_data(tmp_path), cwd=tmp_path, store=store))
    assert "bad.jsonl:1" in message and "bad.jsonl:2" in message
    assert not (tmp_path / "mlflow.db").exists()


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    """One go, not one after the other."""
    done = trainer("plan", "last6_lora", "--tuner.lora_rank", "0", "--training.sede", "1", cwd=tmp_path)
    assert "2 mistakes" in refused(done) and "training.seed" in done.stderr and "tuner.lora_rank" in done.stderr


MALFORMED = [
    ["run"],
    ["run", "last6_lora", "training.seed=3"],
    ["run", "last6_lora", "--training.seed"],
    ["train"],
    ["pocket-base", "--seed", "3"],
]


@pytest.mark.parametrize("arguments", MALFORMED, ids=" ".join)
def test_a_malformed_command_line_is_told_with_status_2(arguments: list[str], tmp_path: Path) -> None:
    """Nothing that was typed is silently left out."""
    done = trainer(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Error: " in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["plan"], ["validate"], ["preview"], ["convert"], ["pocket_base"], ["pocket-base"]],
    ids=lambda c: " ".join(c) or "trainer",
)
def test_help_of_every_command(command: list[str], tmp_path: Path) -> None:
    """Within a second or two: nothing heavy is imported for it."""
    done = trainer(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"Usage: python -m trainer{''.join(' ' + word for word in command)} ")
    if command in (["run"], ["plan"], ["validate"], ["preview"]):
        for option in ("--profile", "--model", "--train_jsonl", "--val_jsonl", "--seed", "--max_steps", "--output_dir"):
            assert option in done.stdout
        assert "--training.num_train_epochs 3" in done.stdout


def test_mistakes_and_help_import_neither_torch_nor_mlflow() -> None:
    """So that they answer at once."""
    script = (
        "import sys; from trainer.__main__ import main\n"
        "plan = ['plan', 'last6_lora', '--tuner.lora_rank', '0']\n"
        "for arguments in (['--help'], ['run', 'nope'], plan, ['convert', 'nope', '--to', 'nope.jsonl']):\n"
        "    sys.argv[1:] = arguments\n"
        "    try: main()\n"
        "    except SystemExit as error: print(error.code)\n"
        "assert not {'torch', 'mlflow', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.findall(r"^\d$", done.stdout, re.MULTILINE) == ["0", "2", "2", "2"]


def test_a_mistake_closes_the_run_that_was_made_for_us(tmp_path: Path) -> None:
    """FAILED, with the message as its description: whoever looks at the MLflow UI learns why."""
    store = empty_store(tmp_path)
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("theirs")).info.run_id
    refused(trainer("run", "last6_lora", "--tuner.lora_rank", "0", cwd=tmp_path, store=store, MLFLOW_RUN_ID=run_id))
    (run,) = runs_in(store, "theirs")
    assert run.info.status == "FAILED"
    assert "tuner.lora_rank" in run.data.tags["mlflow.note.content"]
    assert runs_in(store) == []


# --- signals ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopped:
    """How a training that was sent signals ended."""

    exit_status: int
    run_status: str
    gate: str
    rest_of_stderr: str


SIGNALS: dict[str, list[int]] = {
    "Ctrl-C": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "a closed terminal": [signal.SIGHUP],
    "Ctrl-C, and SIGTERM of MLflow at once": [signal.SIGINT, signal.SIGTERM, signal.SIGTERM],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stopped]:
    """One long training for each kind of signal, two at a time, each stopped after its first step."""
    endless = SMALL | {
        "training.max_steps": "10000",
        "training.num_train_epochs": "10000",
        "training.eval_steps": "10000",
    }
    found = {}
    for pair in (list(SIGNALS)[:2], list(SIGNALS)[2:]):
        folders = {kind: tmp_path_factory.mktemp("stopped") for kind in pair}
        stores = {kind: empty_store(folder) for kind, folder in folders.items()}
        processes = {
            kind: start_trainer("run", "frozen_vision", *flags(endless), cwd=folders[kind], store=stores[kind])
            for kind in pair
        }
        for kind, process in processes.items():
            try:
                wait_for(process, "step     1/10000")
                for number in SIGNALS[kind]:
                    process.send_signal(number)
                    time.sleep(0.03)
                _, rest = process.communicate(timeout=200)
            finally:
                process.kill()
            (run,) = runs_in(stores[kind])
            found[kind] = Stopped(process.returncode, run.info.status, run.data.tags[names.TAG_GATE], rest)
    return found


@pytest.mark.parametrize(
    ("kind", "exit_statuses"),
    zip(SIGNALS, [{130}, {143}, {129}, {130}], strict=True),
    ids=list(SIGNALS),
)
def test_a_stopped_training_is_killed_not_running(
    stopped: dict[str, Stopped], kind: str, exit_statuses: set[int]
) -> None:
    """Status KILLED, the usual exit status, no traceback; the gate, cut short, says that it is open."""
    result = stopped[kind]
    assert (result.run_status, result.gate) == ("KILLED", "open")
    assert result.exit_status in exit_statuses
    assert "Traceback" not in result.rest_of_stderr


def test_signals_that_the_caller_ignores_stay_ignored() -> None:
    """Under nohup a closed terminal must not stop a training."""
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trainer.signals import SIGNALS\n"
        "SIGNALS.install(is_rank=False)\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- crashes ------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_a_run_only_at_its_end_and_loses_nothing(tmp_path: Path) -> None:
    """Played by a limit on file sizes that every checkpoint breaks: training goes on without them, no half checkpoint
    looks whole, and the end, which would leave no result, is told; the same command then ends the same run.
    """
    store = empty_store(tmp_path)
    tiny = SMALL | {"training.max_steps": "1", "tracking.vision_gain_records": "0", "tracking.generate_records": "0"}
    limited = ["bash", "-c", 'ulimit -f 2500; exec "$@"', "-", sys.executable, "-m", "trainer", "run", "last6_lora"]
    done = subprocess.run(
        [*limited, *flags(tiny)], cwd=tmp_path, env=environment(store), capture_output=True, text=True, timeout=300
    )
    message = done.stderr.partition("error: ")[2]
    assert done.returncode == 2 and "last cannot be written: File too large" in message and "make room" in message
    assert "could not save best: File too large" in done.stderr and "Traceback" not in done.stderr
    (failed,) = runs_in(store)
    assert failed.info.status == "FAILED" and failed.data.metrics[names.TRAIN_LOSS] > 0
    artifacts = Path(MlflowClient(store).download_artifacts(failed.info.run_id, ""))
    assert json.loads((artifacts / names.ARTIFACT_GATE).read_text())["faults"] == {}
    assert "File too large" in (artifacts / names.ARTIFACT_TRACEBACK).read_text()
    assert list((tmp_path / "output").rglob("manifest.json")) == []

    again = trainer("run", "last6_lora", *flags(tiny), cwd=tmp_path, store=store)
    assert again.returncode == 0, again.stderr
    (finished,) = runs_in(store)
    assert (finished.info.run_id, finished.info.status) == (failed.info.run_id, "FINISHED")


def test_a_crash_in_training_is_failed_with_its_traceback(tmp_path: Path) -> None:
    """Not status 0, 2 or 3, and everything logged until then is kept: here a sabotaged optimizer step."""
    store = empty_store(tmp_path)
    script = (
        "import trainer.engine, trainer.__main__ as m\n"
        "def update(self, norm): raise RuntimeError('out of memory')\n"
        "trainer.engine.Engine.update = update\n"
        "m.main()\n"
    )
    command = [sys.executable, "-c", script, "run", "frozen_vision", *flags(SMALL)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(store, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    (run,) = runs_in(store)
    assert run.info.status == "FAILED"
    artifacts = Path(MlflowClient(store).download_artifacts(run.info.run_id, ""))
    assert "out of memory" in (artifacts / names.ARTIFACT_TRACEBACK).read_text()
    assert run.data.metrics[names.EVAL_LOSS] > 0


def test_nothing_is_printed_before_the_first_step_but_progress(tmp_path: Path) -> None:
    """Libraries are silent: a new database, and still only our own lines."""
    done = trainer(
        "run", "frozen_vision", *flags(SMALL | {"training.max_steps": "1", "tracking.generate_records": "0"}),
        cwd=tmp_path, store=f"sqlite:///{tmp_path}/new.db",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("step ")] == []
    assert (tmp_path / "new.db").is_file()


def test_a_full_gpu_is_told_with_where_to_read_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Under the traceback, which stays."""

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command_line, "cli", full)
    assert command_line._status() == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.rstrip().endswith("which order.") and "docs/real_model.md" in said

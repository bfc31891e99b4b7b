"""A very long run, of a model that costs nothing: memory, open files and the spool stay as they are.

The short form takes 1,500 optimizer steps, `--long` 20,000; a row at each of them, evaluations and resume points too.
"""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from mlflow import MlflowClient

from tests.conftest import tiny_batch
from tests.running import empty_store, open_run, without_mlflow_variables
from trainer import names
from trainer.cadence import Cadence
from trainer.data.loader import Batch
from trainer.display import Display
from trainer.engine import Engine
from trainer.events import CheckpointSaved, Event, Seen, StepDone
from trainer.gate import Gate
from trainer.loop import EvalSet, Parts, fit
from trainer.metrics import Meter
from trainer.model import TrainedTensor
from trainer.optim import Schedule, make_optimizer
from trainer.reporter import Reporter
from trainer.resume import Keeper
from trainer.spool import SEGMENT_BYTES
from trainer.strategy import Method, Part


class Trivial(torch.nn.Module):
    """One weight for each token id; the loss of a token is its square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(128, 4))

    def forward(self, supervised: torch.Tensor, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        """Losses of the supervised tokens."""
        return self.weight[input_ids[supervised]].square().sum(-1)


def test_a_long_run_stays_as_large_as_it_was_after_warming_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Resident memory to 5 %, open files exactly, the spool within a few segments; and every row is in the store."""
    total = 20_000 if request.config.getoption("--long") else 1_500
    store = empty_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    process, samples, spools = psutil.Process(), [], []

    def look(event: Event) -> None:
        reporter(event)
        if isinstance(event, StepDone) and event.seen.step % (total // 10) == 0:
            deadline = time.monotonic() + 120
            while tracker.waiting and time.monotonic() < deadline:
                time.sleep(0.05)
            samples.append((process.memory_info().rss, open_files(process)))
            spools.append(sum(map(size_of, tmp_path.glob("runs/*/spool/*"))))

    with without_mlflow_variables():
        os.environ["MLFLOW_TRACKING_URI"] = store
        model = Trivial()
        trained = [TrainedTensor("weight", "weight", Part.LLM, Method.FULL, model.weight, False)]
        optimizer = make_optimizer(trained, weight_decay=0.0)
        accelerator = Accelerator(cpu=True)
        engine = Engine(accelerator, model, optimizer, trained, max_grad_norm=1.0)  # type: ignore[arg-type]
        gate = Gate(trained, {}, last_look=2)
        meter = Meter(logging_steps=1, log_first=True, total_steps=total, smoothing=0.6)
        with open_run(run_name="long", close_seconds=120) as tracker, Display(total, quiet=True) as display:
            reporter = Reporter(tracker, meter, display, tmp_path)
            keep = Keeper(tmp_path, engine, {"gate": gate, "reporter": reporter}, accelerator, told=tracker)
            every = frozenset(range(100, total, 100))
            cadence = Cadence(total, n_samples=1, eval_steps=every, resume_steps=every)
            fit(
                Parts(engine, Schedule({"llm": 1e-4}, 1e-6, 1, total), gate, 17),
                batches(),
                {"eval": EvalSet(lambda: [tiny_batch([6], seed=1)])},
                cadence,
                saved,
                look,
                keep=keep,
            )
    (rss, files), (last_rss, last_files) = samples[1], samples[-1]
    print(f"\n{total} steps: {rss / 1e6:.0f} MB after a fifth, {last_rss / 1e6:.0f} MB at the end; spool {spools}")
    assert last_rss <= 1.05 * rss, samples
    assert last_files == files, samples
    assert max(spools) <= 4 * SEGMENT_BYTES, spools
    history = MlflowClient(store).get_metric_history(tracker.run_id, names.TRAIN_LOSS)
    assert sorted(m.step for m in history) == list(range(1, total + 1))


def open_files(process: psutil.Process) -> int:
    """Those that stay open: the delivery's thread has one now and then."""
    looks = []
    for _ in range(20):
        looks.append(process.num_fds())
        time.sleep(0.01)
    return min(looks)


def size_of(path: Path) -> int:
    """In bytes; 0 where the delivery has just removed it."""
    return path.stat().st_size if path.exists() else 0


def saved(seen: Seen, kind: str) -> CheckpointSaved:
    """Nothing is written: adapters are another test's."""
    return CheckpointSaved(seen, kind, "", 1)


def batches() -> Iterator[list[Batch]]:
    """The same batch for ever."""
    return itertools.repeat([tiny_batch([8, 12])])

"""Measures any trainer that is built on transformers.Trainer, from inside its process: import it before that starts.

Needs transformers and psutil, nothing of ours, so that it can be imported in the environment of another project. At the
end of training it adds a line to the file BENCHMARK_OUT, which peers.py reads; BENCHMARK_NAME, BENCHMARK_ARM and
BENCHMARK_CHECKPOINTING (0 or 1) say what was trained.
"""

import functools
import json
import os
from dataclasses import asdict
from importlib import metadata
from typing import Any

from stopwatch import Watch
from transformers import Trainer, TrainerCallback

IGNORED = -100  # label of a token without loss


class Probe(TrainerCallback):
    """Passes steps and losses of one Trainer on to a stopwatch."""

    def __init__(self, trainer: Any, watch: Watch) -> None:
        """Beside a trainer, whose batches are counted as it takes them."""
        self._watch, self._samples, self._supervised = watch, 0, 0
        take = trainer.get_batch_samples

        def counted(*args: Any, **kwargs: Any) -> Any:
            taken = take(*args, **kwargs)
            for batch in taken[0]:
                self._samples += len(batch["image_grid_thw"])
                self._supervised += int((batch["labels"] != IGNORED).sum())
            return taken

        trainer.get_batch_samples = counted
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After an update."""
        self._watch.step(self._samples, self._supervised)
        self._samples = self._supervised = 0

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """As often as the trainer says."""
        if logs and "loss" in logs:
            self._watch.losses.append(float(logs["loss"]))


class Writes(TrainerCallback):
    """Adds a line at the end of training."""

    def __init__(self, watch: Watch) -> None:
        """Beside a probe with the same stopwatch."""
        self._watch = watch

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last step has been taken."""
        line = {
            "name": os.environ["BENCHMARK_NAME"],
            "arm": os.environ["BENCHMARK_ARM"],
            "checkpointing": os.environ.get("BENCHMARK_CHECKPOINTING") == "1",
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
            **asdict(self._watch.result()),
        }
        with open(os.environ["BENCHMARK_OUT"], "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def probe_every_trainer() -> None:
    """Every Trainer that this process builds from now on is measured."""
    build = Trainer.__init__

    @functools.wraps(build)
    def probed(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        watch = Watch()
        Probe(self, watch)
        self.add_callback(Writes(watch))

    Trainer.__init__ = probed


if "BENCHMARK_OUT" in os.environ:
    probe_every_trainer()

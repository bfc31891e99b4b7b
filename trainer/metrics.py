"""Turns the loop's events into metric rows: averages, smoothing, gaps, best-so-far. No torch, no MLflow."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer import names
from trainer.events import (
    EVAL,
    EXCHANGED,
    OOD,
    PROBE,
    CheckpointSaved,
    EvalDone,
    Event,
    GatePassed,
    RecordLosses,
    SaveFailed,
    Seen,
    StageBegun,
    StepDone,
    StoppedEarly,
)

Row = dict[str, float]

SPIKE_WINDOW = 50
"""Train rows that the running median looks back over."""
SPIKE_MADS = 5.0
SPIKE_MIN_ROWS = 10


class Smoothing:
    """TensorBoard's debiased exponential moving average: 1, .5, 0 at weight .6 gives 1, .6875, .33673.

    s_n = w s_(n-1) + (1 - w) x_n, shown as s_n / (1 - w^n); non-finite values pass through and are not remembered.
    """

    def __init__(self, weight: float) -> None:
        """Start empty; `weight` is in [0, 1), 0 smooths nothing."""
        self._weight, self._sum, self._count = weight, 0.0, 0

    def add(self, value: float) -> float:
        """Take the next value and return the smoothed one."""
        if not math.isfinite(value):
            return value
        self._count += 1
        self._sum = self._weight * self._sum + (1 - self._weight) * value
        return self._sum / (1 - self._weight**self._count)

    def state(self) -> list[float]:
        """What `restore` takes."""
        return [self._sum, self._count]

    def restore(self, state: Sequence[float]) -> None:
        """Go on where `state` was taken."""
        self._sum, self._count = float(state[0]), int(state[1])


class Spikes:
    """Counts the train rows that lie above the median of the rows before them by more than `SPIKE_MADS` MADs."""

    def __init__(self) -> None:
        """Start with no rows."""
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._count = 0

    def add(self, loss: float) -> int:
        """Take the next row's loss and return the number of spikes so far."""
        if len(self._recent) >= SPIKE_MIN_ROWS:
            median = statistics.median(self._recent)
            mad = statistics.median(abs(x - median) for x in self._recent)
            self._count += loss > median + SPIKE_MADS * mad
        self._recent.append(loss)
        return self._count

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"recent": list(self._recent), "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._recent = deque(map(float, state["recent"]), maxlen=SPIKE_WINDOW)
        self._count = int(state["count"])


@dataclass(slots=True)
class _Window:
    """What has been summed up since the last train row."""

    loss_sum: float = 0.0
    tokens: int = 0


class Meter:
    """Keeps what rows need to remember: one per run."""

    def __init__(self, *, logging_steps: int, log_first: bool, total_steps: int, smoothing: float) -> None:
        """Start a run.

        Args:
            logging_steps: a train row every so many optimizer steps, and at the last one.
            log_first: also at step 1.
            total_steps: optimizer steps of the whole run.
            smoothing: weight of TensorBoard's moving average, over rows.
        """
        self._logging_steps, self._log_first, self._total_steps = logging_steps, log_first, total_steps
        self._train, self._eval, self._spikes = Smoothing(smoothing), Smoothing(smoothing), Spikes()
        self._window, self._row_seen = _Window(), Seen()
        self._train_smoothed: float | None = None
        self._evals: list[tuple[float, Seen]] = []
        self._evaluation_seconds = 0.0
        self._without_row: StepDone | None = None

    def rows(self, event: Event) -> Row:
        """The metrics that an event brings, all at the event's step; empty when none is due."""
        match event:
            case StepDone():
                return self._step_row(event)
            case EvalDone():
                return self._eval_row(event)
            case CheckpointSaved():
                return {names.CHECKPOINT_BYTES: float(event.size_bytes)}
            case StoppedEarly():
                return self._train_row(self._without_row) if self._without_row else {}
            case GatePassed() | SaveFailed() | StageBegun():
                return {}

    def state(self) -> dict[str, Any]:
        """All that rows to come depend on, for a resume point; JSON-able."""
        return {
            "smoothing": [self._train.state(), self._eval.state()],
            "spikes": self._spikes.state(),
            "window": asdict(self._window),
            "row_seen": asdict(self._row_seen),
            "train_smoothed": self._train_smoothed,
            "evals": [[loss, asdict(seen)] for loss, seen in self._evals],
            "evaluation_seconds": self._evaluation_seconds,
            "without_row": None if self._without_row is None else asdict(self._without_row),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            KeyError, TypeError, ValueError: it is not a state.
        """
        for smoothing, of_it in zip((self._train, self._eval), state["smoothing"], strict=True):
            smoothing.restore(of_it)
        self._spikes.restore(state["spikes"])
        self._window = _Window(**state["window"])
        self._row_seen = Seen(**state["row_seen"])
        self._train_smoothed = state["train_smoothed"]
        self._evals = [(float(loss), Seen(**seen)) for loss, seen in state["evals"]]
        self._evaluation_seconds = float(state["evaluation_seconds"])
        step = state["without_row"]
        self._without_row = None if step is None else StepDone(**{**step, "seen": Seen(**step["seen"])})

    def _step_row(self, event: StepDone) -> Row:
        self._window.loss_sum += event.loss * event.supervised_tokens
        self._window.tokens += event.supervised_tokens
        step = event.seen.step
        first = step == 1 and self._log_first
        if step % self._logging_steps and step != self._total_steps and not first:
            self._without_row = event
            return {}
        return self._train_row(event)

    def _train_row(self, event: StepDone) -> Row:
        self._without_row = None
        loss = self._window.loss_sum / self._window.tokens
        self._window = _Window()
        self._train_smoothed = self._train.add(loss)
        seconds = event.seen.train_seconds - self._row_seen.train_seconds
        row = {
            names.TRAIN_LOSS: loss,
            names.TRAIN_LOSS_SMOOTHED: self._train_smoothed,
            names.LOSS_SPIKES: float(self._spikes.add(loss)),
            names.SAMPLES_PER_SECOND: (event.seen.samples - self._row_seen.samples) / seconds,
            names.TOKENS_PER_SECOND: (event.seen.tokens - self._row_seen.tokens) / seconds,
            **{names.LEARNING_RATE + part: rate for part, rate in event.learning_rates.items()},
            **{names.GRAD_NORM + part: norm for part, norm in event.grad_norms.items()},
            **_counters(event.seen),
        }
        self._row_seen = event.seen
        return row

    def _eval_row(self, event: EvalDone) -> Row:
        losses = {name: record_losses.mean() for name, record_losses in event.losses.items()}
        loss = losses[EVAL]
        smoothed = self._eval.add(loss)
        row = {names.EVAL_LOSS: loss, names.EVAL_LOSS_SMOOTHED: smoothed, **self._best(loss, event.seen)}
        for domain, domain_loss in event.losses[EVAL].mean_by_domain().items():
            row[names.EVAL_LOSS_BY_DOMAIN + domain] = domain_loss
        if OOD in losses:
            row[names.OOD_LOSS] = losses[OOD]
        if PROBE in losses:
            row[names.PROBE_LOSS] = losses[PROBE]
            row[names.GAP_CLEAN] = loss - losses[PROBE]
        if self._train_smoothed is not None:
            row[names.GAP] = smoothed - self._train_smoothed
        if EXCHANGED in losses:
            row[names.VISION_GAIN] = vision_gain(event.losses)
        self._evaluation_seconds += event.seconds
        return {**row, names.EVALUATION_SECONDS: self._evaluation_seconds, **_counters(event.seen)}

    def _best(self, loss: float, seen: Seen) -> Row:
        self._evals.append((loss, seen))
        best_loss, best_seen = min(self._evals, key=lambda pair: pair[0])
        near = next(s for value, s in self._evals if value <= best_loss * 1.01)
        return {
            names.BEST_LOSS: best_loss,
            names.BEST_STEP: float(best_seen.step),
            names.SAMPLES_TO_BEST: float(near.samples),
        }


def vision_gain(losses: Mapping[str, RecordLosses]) -> float:
    """Loss with images exchanged minus loss with the right ones, over the exchanged records, nats per token."""
    exchanged, right = losses[EXCHANGED], losses[EVAL]
    own = dict(zip(right.record_ids, right.loss_sums, strict=True))
    right_sum = math.fsum(own[record_id] for record_id in exchanged.record_ids)
    return (math.fsum(exchanged.loss_sums) - right_sum) / sum(exchanged.token_counts)


def _counters(seen: Seen) -> Row:
    return {
        names.EPOCH: seen.epoch,
        names.SAMPLES_SEEN: float(seen.samples),
        names.TOKENS_SEEN: float(seen.tokens),
        names.SUPERVISED_TOKENS_SEEN: float(seen.supervised_tokens),
        names.TRAIN_SECONDS: seen.train_seconds,
    }

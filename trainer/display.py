"""Shows a run while it happens: a progress bar on a terminal, one plain line a row where there is none."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer import names
from trainer.events import CheckpointSaved, EvalDone, Event, GatePassed, SaveFailed, StageBegun, StepDone, StoppedEarly


class Display:
    """Writes to standard error, so that standard output stays for results."""

    def __init__(self, total_steps: int, console: Console | None = None, *, quiet: bool = False) -> None:
        """Show `total_steps` optimizer steps; `quiet` shows nothing (ranks other than the first)."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not self._live,
        )
        self._total = total_steps
        self._task = self._progress.add_task("step", total=total_steps, losses="")
        self._latest: dict[str, float] = {}

    def event(self, event: Event, row: Mapping[str, float]) -> None:
        """Show what an event and the metrics it brought say."""
        self._latest.update(row)
        match event:
            case StepDone():
                self._progress.update(self._task, completed=event.seen.step, losses=_shown(self._latest))
                if row:
                    self._line(event.seen.step, _shown(row))
            case EvalDone():
                self._progress.update(self._task, losses=_shown(self._latest))
                self._line(event.seen.step, f"evaluated in {event.seconds:.1f} s: {_shown(row)}", always=True)
            case CheckpointSaved():
                self._line(event.seen.step, f"saved {event.kind} ({event.size_bytes / 1e6:.1f} MB)")
            case SaveFailed():
                kept = "what was saved before is untouched"
                self._line(event.seen.step, f"could not save {event.what}: {event.reason}; {kept}", always=True)
            case GatePassed():
                said = "training gate passed: every planned tensor trains, no other has changed"
                self._line(event.seen.step, said, always=True)
            case StageBegun():
                new, blocks = (", ".join(map(str, of)) for of in (event.new, event.blocks))
                self._line(event.seen.step, f"vision blocks {new} begin to train; now {blocks} do", always=True)
            case StoppedEarly():
                no_better = f"no better eval loss in {event.evaluations} evaluations"
                self._line(event.seen.step, f"stopped early: {no_better}", always=True)

    def say(self, text: str) -> None:
        """One line about what happens after training."""
        self._console.print(text, markup=False)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def _line(self, step: int, text: str, *, always: bool = False) -> None:
        if always or not self._live:
            self._console.print(f"step {step:>{len(str(self._total))}}/{self._total}  {text}", markup=False)


_WORDS = {
    names.TRAIN_LOSS_SMOOTHED: "train",
    names.EVAL_LOSS: "eval",
    names.BEST_LOSS: "best",
    names.GAP: "gap",
    names.VISION_GAIN: "vision gain",
}


def _shown(row: Mapping[str, float]) -> str:
    """The few numbers that are worth watching, of those that a row has."""
    parts = [f"{word} {row[key]:.4f}" for key, word in _WORDS.items() if key in row]
    if names.TOKENS_PER_SECOND in row:
        parts.append(f"{row[names.TOKENS_PER_SECOND]:,.0f} tokens/s")
    return "  ".join(parts)

"""TensorBoard's event files as runs for MLflow: every scalar with step and wall time, by TensorBoard's own reader."""

import re
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from analysis.curves import SMOOTHING, last_write_wins
from analysis.runs import Imported
from trainer import names
from trainer.errors import UserError

SOURCE = "tensorboard"

_PATTERN = "events.out.tfevents.*"
_NOT_IN_A_NAME = re.compile(r"[^\w\-. /:]")
_SMOOTHED = {names.EVAL_LOSS: names.EVAL_LOSS_SMOOTHED, names.TRAIN_LOSS: names.TRAIN_LOSS_SMOOTHED}
"""What a ranking reads and other trainers do not log: smoothed as TensorBoard shows it."""


def tensorboard_runs(folder: Path) -> Iterator[Imported]:
    """The runs below a folder: each folder with event files is one, named by its path from there.

    Steps that were written twice after a resume are both kept, with their times. To `eval/loss` and `train/loss` their
    smoothed forms are added, and the lowest eval loss with its step.

    Args:
        folder: of one run, or of many.

    Raises:
        UserError: there are no event files with scalars.
    """
    found = sorted({path.parent for path in folder.rglob(_PATTERN)})
    if not found:
        raise UserError(
            str(folder),
            "no event files below it" if folder.is_dir() else "no such folder",
            f"a folder with files named {_PATTERN}",
            "give the folder that TensorBoard was started with (--logdir)",
        )
    n_runs = 0
    for run in found:
        made = _imported(run, run.relative_to(folder).as_posix() if run != folder else folder.resolve().name)
        if made.rows:  # those of hyperparameters have none
            n_runs += 1
            yield made
    if not n_runs:
        raise UserError(
            str(folder), "event files without a scalar", "scalars as torch.utils.tensorboard writes them",
            "give the folder of such files; summaries of TensorFlow 2 are tensors, which are not read",
        )  # fmt: skip


def _imported(folder: Path, name: str) -> Imported:
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}, purge_orphaned_data=False)  # 0: all of them
    events.Reload()
    rows: list[tuple[str, int, int, float]] = []
    for tag in events.Tags()[SCALARS]:
        metric = _NOT_IN_A_NAME.sub("_", tag)
        points = [(event.step, round(1000 * event.wall_time), event.value) for event in events.Scalars(tag)]
        rows += [(metric, step, time, value) for step, time, value in points]
        curve = last_write_wins(points)
        times = curve.times.tolist()
        if metric in _SMOOTHED:
            smoothed = zip(curve.steps.tolist(), times, curve.smoothed().values.tolist(), strict=True)
            rows += [(_SMOOTHED[metric], step, time, value) for step, time, value in smoothed]
        if metric == names.EVAL_LOSS and (best := curve.lowest()) is not None:
            rows.append((names.BEST_LOSS, int(curve.steps[-1]), times[-1], float(curve.values[best])))
            rows.append((names.BEST_STEP, int(curve.steps[-1]), times[-1], float(curve.steps[best])))
    return Imported(
        key=f"{SOURCE}:{name}:{min((time for _, _, time, _ in rows), default=0)}",  # two folders may hold a `seed17`
        name=name,
        note=f"Imported from TensorBoard's event files in `{folder}`; not trained by this project. Smoothed losses "
        f"(weight {SMOOTHING}) and the lowest eval loss were added.",
        tags={names.TAG_STRATEGY: name, names.TAG_SOURCE: SOURCE},
        params={},
        rows=rows,
    )

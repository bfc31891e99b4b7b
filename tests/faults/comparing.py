"""What an interrupted and resumed run must have in common with one that was left in peace: everything that is exact."""

from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from tests.running import SMALL, runs_in
from trainer import names
from trainer.checkpoint import file_sha256

# Six optimizer steps, a row at each; evaluations and resume points at 2 and 4, and the end.
SHORT = SMALL | {"training.max_steps": "6", "training.logging_steps": "1", "training.eval_steps": "2"}


@dataclass(frozen=True)
class Result:
    """A run as it came out."""

    run: Run
    rows: dict[str, list[tuple[int, float]]]
    """Metric -> (step, value) of every row in the store, in the order of steps."""
    files: dict[str, str]
    """Adapter's file -> SHA-256."""
    memory: dict[str, object]
    """Tensor of the last resume point (weights and what the optimizer remembers), if it was left -> its bytes."""


def result_of(folder: Path, store: str) -> Result:
    """The one run of a store, and what lies in its folder below `folder`."""
    (run,) = (run for run in runs_in(store) if names.TAG_STRATEGY in run.data.tags)
    client = MlflowClient(store)
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    rows = {name: sorted((m.step, m.value) for m in history) for name, history in histories.items()}
    (home,) = (path.parent for path in (folder / "output").glob("*/run.json"))
    adapters = {path.parent.name: file_sha256(path) for path in home.glob("*/adapter_model.safetensors")}
    points = sorted(home.glob("resume/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    tensors = load_file(points[-1] / "tensors.safetensors") if points else {}
    return Result(run, rows, adapters, {name: value.numpy().tobytes() for name, value in tensors.items()})


def assert_same(resumed: Result, left_alone: Result) -> None:
    """Bit-identical in exact metrics, adapters and optimizer; in all metrics no step is missing, and none twice."""
    assert resumed.run.info.status == "FINISHED"
    assert resumed.run.data.tags[names.TAG_GATE] == "passed"
    assert resumed.rows.keys() == left_alone.rows.keys()
    for name, rows in left_alone.rows.items():
        if names.metric(name).exact:
            assert resumed.rows[name] == rows, f"{name}: {resumed.rows[name]}, left alone {rows}"
        else:
            assert [step for step, _ in resumed.rows[name]] == [step for step, _ in rows], name
    assert resumed.files == left_alone.files
    assert resumed.memory == left_alone.memory
    artifacts = [set(_artifacts(result)) for result in (resumed, left_alone)]
    assert artifacts[0] >= artifacts[1]
    assert resumed.run.data.params == left_alone.run.data.params


def _artifacts(result: Result) -> list[str]:
    root = result.run.info.artifact_uri
    assert root is not None
    return [str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()]

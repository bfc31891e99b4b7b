"""The door to MLflow for what runs have left there: checkpoints of runs and registered models, as folders."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

from trainer import names
from trainer.checkpoint import BadCheckpoint, verify
from trainer.errors import TrackingError
from trainer.tracking import reach_store, told

MODELS = "models:/"
_ABSENT = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}


def fetched(source: str) -> Path:
    """The folder of the checkpoint that an MLflow run or a registered model stands for.

    Args:
        source: `models:/NAME@ALIAS` or `models:/NAME/VERSION`, else the id of a run.

    Returns:
        The run's result, where it is on this machine and whole; else a copy of what the store has, as long as this
        process lives.

    Raises:
        TrackingError: there is no such thing, or no checkpoint of it can be had.
    """
    store = reach_store()
    if store.away:
        raise TrackingError(f"MLFLOW_TRACKING_URI ({store.name})", store.away, "a store that is there", "start it")
    with told(store.uri), _known(source, store.name):
        client = MlflowClient(store.uri)
        if source.startswith(MODELS):
            return Path(download_artifacts(source, dst_path=_for_this_process(), tracking_uri=store.uri))
        run = client.get_run(source)
        found = {item.path for item in client.list_artifacts(source)}
        if names.ARTIFACT_CHECKPOINTS in found:
            with tempfile.TemporaryDirectory() as aside:
                text = Path(client.download_artifacts(source, names.ARTIFACT_CHECKPOINTS, aside)).read_text("utf-8")
            saved = json.loads(text)
            best = saved.get(run.data.tags.get(names.TAG_RESULT, "")) or saved.get("best") or saved.get("last")
            if best and _is_whole(Path(best["path"])):
                return Path(best["path"])
        if names.ARTIFACT_CHAMPION in found:
            return Path(client.download_artifacts(source, names.ARTIFACT_CHAMPION, _for_this_process()))
    raise TrackingError(
        f"run {run.info.run_name} ({source})",
        "no checkpoint on this machine, and none in the store: a run's own stay where it was trained",
        "a run of this machine, or one that was promoted",
        "use it where it was trained, or promote it there: python -m analysis promote",
    )


def _for_this_process() -> str:
    """A folder that goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _known(source: str, store: str) -> Iterator[None]:
    """What the store does not have is a mistake in the source."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise TrackingError(
            source,
            str(error).splitlines()[0],
            f"a run or a registered model of {store}",
            "correct it, or MLFLOW_TRACKING_URI; python -m analysis rank --each lists runs",
        ) from None


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except BadCheckpoint:
        return False
    return True


def figures(training_key: str, step: int) -> dict[str, float]:
    """Metrics of a training at an optimizer step, the last one before it where it has no row there.

    Returns:
        Metric -> value; nothing where the store is away or does not have the run.
    """
    try:
        store = reach_store()
        with told(store.uri):
            client = MlflowClient(store.uri)
            everywhere = [each.experiment_id for each in client.search_experiments()]
            runs = client.search_runs(everywhere, f"tags.{names.TAG_KEY} = '{training_key}'", max_results=1)
            if not runs:
                return {}
            found = {}
            for name in sorted(runs[0].data.metrics.keys() & _TOLD):
                rows = [row for row in client.get_metric_history(runs[0].info.run_id, name) if row.step <= step]
                if rows:
                    found[name] = max(rows, key=lambda row: (row.step, row.timestamp)).value
            return found
    except TrackingError:
        return {}


_TOLD = {
    names.EVAL_LOSS, names.GAP, names.GAP_CLEAN, names.F1, names.PRECISION, names.RECALL, names.F1_ATTRIBUTES,
    names.VISION_GAIN, names.OOD_LOSS, names.SAMPLES_SEEN, names.TRAIN_SECONDS,
}  # fmt: skip
"""Metrics that a model card gives."""

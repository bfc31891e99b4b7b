"""The one door to MLflow here: runs, whole curves and artifacts in; imported runs, reports and champions out."""

import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlMetric
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from mlflow.utils.rest_utils import http_request_safe
from sqlalchemy import select

from analysis.curves import Curve, last_write_wins
from analysis.runs import PARENT, Imported, Run
from trainer import names
from trainer.addresses import sqlite_file, without_password
from trainer.config.problems import nearest, shown
from trainer.errors import TrackingError
from trainer.tracking import alone_at_birth, reach_store, told

PAGE = 1000
"""Runs of one page; what is kept of a page that has been read is up to the reader."""
BULK_ROWS = 25_000
"""MLflow's server cuts a bulk answer here, and says nothing."""
BULK_RUNS = 40
"""Runs of one request: so many fill an answer with 600 rows each. Beyond 100 the server refuses."""
_AT_ONCE = 4
"""Requests under way together: as many as a server has workers, unless told otherwise."""

_BULK_ROUTE = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_QUOTED = re.compile(r"""('[^']*'|"[^"]*"|`[^`]*`)""")
_OF_A_FILTER = ("filter", "clause", "invalid", "expected")
"""Words of MLflow's errors about filters."""
_PLAIN_NAME = re.compile(r"\b(params|metrics|tags)\.([^\s=<>!`'\"]+)")

Row = tuple[int, int, float]
"""(step, time in milliseconds, value)."""


class Store:
    """An MLflow store, reached once; every method raises TrackingError where the store cannot do what is asked."""

    def __init__(self, *, create: bool = False) -> None:
        """Reach the store of `MLFLOW_TRACKING_URI`.

        Args:
            create: make a SQLite file that is not there, as what is written to needs; to read it would be empty.

        Raises:
            TrackingError: it cannot be reached, or is a SQLite file that is not there.
        """
        # a bar for every small file and two lines for every run that ends say nothing here
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        reached = reach_store()
        self.uri = reached.uri
        if reached.away:  # training can wait for it, and reading cannot
            raise TrackingError(
                f"MLFLOW_TRACKING_URI ({reached.name})",
                reached.away,
                "a store that is there",
                "start it, or correct it",
            )
        if not create and self.uri.startswith("sqlite") and not sqlite_file(self.uri).is_file():
            raise TrackingError(
                f"MLFLOW_TRACKING_URI ({self.uri})",
                "a SQLite file that is not there",
                "a store with runs in it",
                "train something first (mlflow run . -e last6_lora), or correct MLFLOW_TRACKING_URI",
            )
        with told(self.uri), alone_at_birth(self.uri):
            self._client = MlflowClient(self.uri)
            self._database: Any = getattr(self._client._tracking_client.store, "engine", None)

    def __str__(self) -> str:
        """The address, without a password."""
        return without_password(self.uri)

    def runs(self, experiment: str | None = None, where: str | None = None) -> Iterator[Run]:
        """Runs that carry a `strategy` tag, newest first, page by page.

        Args:
            experiment: name of the experiment; None: all.
            where: a filter in MLflow's language, such as `params.tuner.lora_rank = '16'`; names need no backticks.

        Raises:
            TrackingError: there is no such experiment, or MLflow does not understand the filter.
        """
        experiments = self._experiments(experiment)
        condition = f"tags.`{names.TAG_STRATEGY}` LIKE '%'"
        if where:
            condition += f" AND {quoted(where)}"
        token: str | None = None
        while True:
            try:
                with told(self.uri):
                    page = self._client.search_runs(
                        [*experiments], condition, ViewType.ACTIVE_ONLY, PAGE, ["attributes.start_time DESC"], token
                    )
            except TrackingError as error:
                if where is None or not any(word in error.got.lower() for word in _OF_A_FILTER):
                    raise
                raise TrackingError(
                    f"--where {where}",
                    error.got,
                    "comparisons of params, tags, metrics or attributes, joined by AND; texts in single quotes",
                    "give one such as --where \"params.tuner.lora_rank = '16' AND metrics.eval/loss < 0.6\"",
                ) from None
            yield from (_run(run, experiments[run.info.experiment_id]) for run in page)
            token = page.token
            if not token:
                return

    def curves(self, run_ids: Iterable[str], metric: str) -> dict[str, Curve]:
        """The whole curve of one metric for many runs: by a query of a database, by few requests to a server.

        Args:
            run_ids: MLflow's run ids.
            metric: full name.

        Returns:
            Run id -> curve; runs without the metric have an empty one.
        """
        wanted = sorted(set(run_ids))
        rows: dict[str, list[Row]] = {run_id: [] for run_id in wanted}
        asked = [wanted[start : start + BULK_RUNS] for start in range(0, len(wanted), BULK_RUNS)]
        fetch = self._from_database if self._database is not None else self._from_server
        with told(self.uri), ThreadPoolExecutor(_AT_ONCE) as pool:
            for answer in pool.map(lambda ids: fetch(ids, metric), asked):
                for run_id, step, time, value in answer:
                    rows[run_id].append((step, time, finite_or_infinite(value)))
        return {run_id: last_write_wins(run_rows) for run_id, run_rows in rows.items()}

    def record_losses(self, run_id: str) -> pd.DataFrame | None:
        """Per-record losses of the best and the last evaluation, or None where the run has none.

        Returns:
            Columns at, step, set, record_id, domain, loss_sum (nats), tokens (supervised).
        """
        data = self._artifact(run_id, names.ARTIFACT_RECORD_LOSSES)
        return None if data is None else pd.read_parquet(io.BytesIO(data))

    def artifact_json(self, run_id: str, name: str) -> Any:
        """A JSON artifact, or None where the run has none."""
        data = self._artifact(run_id, name)
        return None if data is None else json.loads(data)

    def dataset_path(self, run_id: str, name: str) -> Path | None:
        """The JSONL file that a run has logged as its dataset `train`, `val` or `ood`; None where it has none."""
        with told(self.uri):
            inputs = self._client.get_run(run_id).inputs
        logged = inputs.dataset_inputs if inputs else []
        sources = [json.loads(each.dataset.source) for each in logged if each.dataset.name == name]
        return Path(sources[0]["uri"]) if sources else None

    def artifact_lines(self, run_id: str, name: str) -> list[Any] | None:
        """The values of a JSONL artifact, or None where the run has none."""
        data = self._artifact(run_id, name)
        return None if data is None else [json.loads(line) for line in data.decode("utf-8").split("\n") if line]

    def import_run(self, imported: Imported, experiment: str) -> tuple[str, bool]:
        """Write a run that was trained elsewhere; what an earlier import has written is not there twice afterwards.

        An import that was cut short is completed; a run that has grown since gets what is new.

        Args:
            imported: the run.
            experiment: name; made where there is none.

        Returns:
            Run id, and whether anything was added.
        """
        tags = {
            **imported.tags,
            names.TAG_IMPORTED: imported.key,
            MLFLOW_RUN_NAME: imported.name,
            MLFLOW_RUN_NOTE: imported.note,
        }
        with told(self.uri):
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            condition = f"tags.`{names.TAG_IMPORTED}` = {_literal(imported.key)}"
            earlier = self._client.search_runs([experiment_id], condition)
            if earlier and earlier[0].data.tags.get(names.TAG_IMPORTED_ROWS) == str(len(imported.rows)):
                return earlier[0].info.run_id, False
            times = [time for _, _, time, _ in imported.rows] or [0]
            run = earlier[0] if earlier else self._client.create_run(experiment_id, min(times), tags)
            run_id: str = run.info.run_id
            params = [Param(key, value) for key, value in imported.params.items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(run_id, params=params[start : start + 100])
            rows = [Metric(metric, value, time, step) for metric, step, time, value in imported.rows]
            for start in range(0, len(rows), 1000):  # rows of one time and step are one row, however often written
                self._client.log_batch(run_id, metrics=rows[start : start + 1000])
            self._client.set_terminated(run_id, end_time=max(times))
            self._client.set_tag(run_id, names.TAG_IMPORTED_ROWS, str(len(rows)))  # last: it says that all are there
        return run_id, True

    def comparison_run(self, runs: Sequence[Run]) -> tuple[str, bool]:
        """The run that stands for a comparison: the parent of all these runs, or one that is made to hold its report.

        Under `mlflow run` that is the run which MLflow has made already. The same runs find the same one again. It
        carries no `strategy` tag, so that no ranking takes it.

        Args:
            runs: at least one.

        Returns:
            Its id, and whether it was made to hold a report; a parent is the user's own.
        """
        parents = {run.tags.get(PARENT) for run in runs}
        if len(parents) == 1 and (parent := parents.pop()):
            return parent, False
        key = hashlib.sha256(" ".join(sorted(run.id for run in runs)).encode()).hexdigest()[:32]
        experiment_id = runs[0].experiment_id
        arms = ", ".join(sorted({run.strategy for run in runs}))
        tags = {names.TAG_COMPARISON: key, MLFLOW_RUN_NAME: f"comparison of {arms}"[:200]}
        with told(self.uri):
            if own := os.environ.get("MLFLOW_RUN_ID"):
                for name, value in tags.items():
                    self._client.set_tag(own, name, value)
                return own, True
            where = sorted({run.experiment_id for run in runs})
            found = self._client.search_runs(where, f"tags.`{names.TAG_COMPARISON}` = '{key}'")
            if found:
                return str(found[0].info.run_id), True
            made: str = self._client.create_run(experiment_id, tags=tags).info.run_id
            self._client.set_terminated(made)
        return made, True

    def log_file(self, run_id: str, path: Path, folder: str) -> None:
        """Store a file as an artifact of a run, below `folder`."""
        with told(self.uri):
            self._client.log_artifact(run_id, str(path), folder)

    def describe(self, run_id: str, markdown: str) -> None:
        """Set a run's description, which the MLflow UI renders."""
        with told(self.uri):
            self._client.set_tag(run_id, MLFLOW_RUN_NOTE, markdown)

    def promote(self, run_id: str, checkpoint: Path, model: str, alias: str, tags: Mapping[str, str]) -> str:
        """Make a checkpoint a version of a registered model, and point an alias at it.

        The files become artifacts of the run first, so that the version can be had wherever the store can. A second
        promotion of the same files finds the version again.

        Args:
            run_id: the run that the checkpoint is of.
            checkpoint: its folder.
            model: name in the Model Registry; made where there is none.
            alias: of the version from now on.
            tags: of the version; must hold `names.TAG_CHECKPOINT_DIGEST`.

        Returns:
            The version.
        """
        with told(self.uri):
            try:
                self._client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            digest = tags[names.TAG_CHECKPOINT_DIGEST]
            for version in self._client.search_model_versions(f"name = {_literal(model)}"):
                if version.run_id == run_id and version.tags.get(names.TAG_CHECKPOINT_DIGEST) == digest:
                    break
            else:
                self._client.log_artifacts(run_id, str(checkpoint), names.ARTIFACT_CHAMPION)
                source = f"{self._client.get_run(run_id).info.artifact_uri}/{names.ARTIFACT_CHAMPION}"
                version = self._client.create_model_version(model, source, run_id, dict(tags))
            for key, value in tags.items():
                self._client.set_model_version_tag(model, version.version, key, value)
            self._client.set_registered_model_alias(model, alias, version.version)
        return str(version.version)

    def _artifact(self, run_id: str, name: str) -> bytes | None:
        with told(self.uri), tempfile.TemporaryDirectory() as folder:
            if name not in {item.path for item in self._client.list_artifacts(run_id)}:
                return None
            return Path(self._client.download_artifacts(run_id, name, folder)).read_bytes()

    def _experiments(self, name: str | None) -> dict[str, str]:
        """Id -> name: of one experiment, or of all."""
        with told(self.uri):
            found = {e.experiment_id: e.name for e in _all_pages(self._client)}
        if name is None:
            return found
        if name not in found.values():
            raise TrackingError(
                "--experiment",
                shown(name),
                ", ".join(sorted(found.values())) or "none: the store is empty",
                f"did you mean {near}?" if (near := nearest(name, found.values())) else "take one of these",
            )
        return {experiment_id: of for experiment_id, of in found.items() if of == name}

    def _from_database(self, run_ids: Sequence[str], metric: str) -> list[tuple[str, int, int, float]]:
        """(run id, step, time, value) of all rows, read past MLflow's objects, which take ten times as long as rows."""
        table = SqlMetric.__table__
        query = select(table.c.run_uuid, table.c.step, table.c.timestamp, table.c.value, table.c.is_nan).where(
            table.c.key == metric, table.c.run_uuid.in_(run_ids)
        )
        ordered = query.order_by(table.c.run_uuid, table.c.timestamp, table.c.step, table.c.value)
        with self._database.connect() as connection:
            found = connection.execute(ordered).all()
        return [(run_id, step, time, math.nan if is_nan else value) for run_id, step, time, value, is_nan in found]

    def _from_server(self, run_ids: Sequence[str], metric: str) -> list[tuple[str, int, int, float]]:
        """The same by the route of MLflow's own UI, which has no method in its client and cuts at `BULK_ROWS`."""
        rows: list[tuple[str, int, int, float]] = []
        wanted = sorted(run_ids)
        while wanted:
            answer = http_request_safe(  # type: ignore[no-untyped-call]  # MLflow annotates neither
                self._client._tracking_client.store.get_host_creds(),
                _BULK_ROUTE,
                "GET",
                params={"run_id": wanted, "metric_key": metric, "max_results": BULK_ROWS},
            )
            found = [
                (row["run_id"], row["step"], row["timestamp"], float(row["value"]))
                for row in json.loads(answer.text)["metrics"]
            ]
            if len(found) < BULK_ROWS:
                return rows + found
            # sorted by run: where the answer was cut, the run that it ends in is the only one that lacks rows
            cut = found[-1][0]
            if cut == wanted[0]:
                found = [(cut, m.step, m.timestamp, m.value) for m in self._client.get_metric_history(cut, metric)]
            rows += found if cut == wanted[0] else [row for row in found if row[0] != cut]
            wanted = wanted[1:] if cut == wanted[0] else wanted[wanted.index(cut) :]
        return rows


def finite_or_infinite(value: float) -> float:
    """A value as it was logged: databases hold no infinities, and MLflow writes the largest float in their place."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _literal(text: str) -> str:
    """A text as MLflow's filters take it; one with both kinds of quotes cannot be told to them."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def quoted(where: str) -> str:
    """A filter with backticks around the names of params, metrics and tags, where they are missing."""
    pieces = _QUOTED.split(where)
    pieces[::2] = [_PLAIN_NAME.sub(r"\1.`\2`", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _all_pages(client: MlflowClient) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _run(run: MlflowRun, experiment: str) -> Run:
    return Run(
        id=run.info.run_id,
        name=run.info.run_name or "",
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        started=run.info.start_time or 0,
        params=run.data.params,
        tags=run.data.tags,
        metrics={name: finite_or_infinite(value) for name, value in run.data.metrics.items()},
        last_step=max((metric.step for metric in run.data._metric_objs), default=0),
        experiment=experiment,
    )

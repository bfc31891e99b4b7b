"""Writes the report on a comparison: figures, Markdown, one HTML file; and logs it to MLflow."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from analysis import plots
from analysis.advice import recommendation
from analysis.checks import careful_reading
from analysis.comparison import Comparison, default_axis
from analysis.page import html
from analysis.ranking import Ranking, verdict
from analysis.records import over_records
from analysis.sections import Material, document
from analysis.store import Store
from analysis.subject import subject_of
from trainer import names

ARTIFACTS = "report"
"""Artifact folder of the run that holds a report."""


def write(store: Store, comparison: Comparison, folder: Path, axis: str | None, points: Sequence[float]) -> list[Path]:
    """Write `report.md`, `report.html` and `figures/`.

    Args:
        store: for per-record losses and environments, which are artifacts of the runs.
        comparison: of at least one arm.
        folder: made where it is not there.
        axis: of curves, a key of `comparison.AXES`; None: what suits the runs.
        points: where on it curves are told; empty: at round numbers.

    Returns:
        The two documents.
    """
    ranking = comparison.ranking
    axis = axis or default_axis(ranking)
    run_ids = [reading.run.id for row in ranking.rows for reading in row.readings]
    found = {run_id: store.artifact_json(run_id, names.ARTIFACT_ENVIRONMENT) for run_id in run_ids}
    figures = plots.draw(comparison, folder / "figures", axis)
    material = Material(
        comparison=comparison,
        records=over_records(ranking, store.record_losses),
        environments={run_id: environment for run_id, environment in found.items() if environment},
        figures=[path.stem for path in figures],
        axis=axis,
        made=datetime.now(UTC),
        points=points,
    )
    text = document(material)
    written = {folder / "report.md": text, folder / "report.html": html(text, folder)}
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    return [*written]


def log(store: Store, ranking: Ranking, folder: Path) -> str:
    """Store a written report in the comparison's parent run, whose description becomes its summary; that run's id."""
    run_id = store.comparison_run([reading.run for row in ranking.rows for reading in row.readings])
    advice = recommendation(ranking, careful_reading(subject_of(ranking)))
    summary = [f"**{advice.arm}** comes first; confidence: {advice.confidence}.", "", *verdict(ranking)]
    store.log_folder(run_id, folder, ARTIFACTS)
    store.describe(run_id, "\n".join([*summary, "", f"The whole report: artifact `{ARTIFACTS}/report.html`."]))
    return run_id

"""Writes the report on a comparison: figures, Markdown, one HTML file; and logs it to MLflow."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from analysis import plots
from analysis.advice import recommendation
from analysis.checks import careful_reading
from analysis.comparison import Comparison, default_axis
from analysis.page import html
from analysis.ranking import Ranking
from analysis.records import over_records
from analysis.sections import FIGURES, Material, document
from analysis.store import Store
from analysis.subject import subject_of
from analysis.verdict import verdict
from trainer import names

ARTIFACTS = "report"
"""Artifact folder of the run that holds a report."""
GALLERY = "gallery"
"""Likewise of one that holds a gallery."""


def write(store: Store, comparison: Comparison, folder: Path, axis: str | None, points: Sequence[float]) -> list[Path]:
    """Write `report.md`, `report.html` and `figures/`.

    Args:
        store: for per-record losses and environments, which are artifacts of the runs.
        comparison: of at least one arm.
        folder: made where it is not there.
        axis: of curves, a key of `comparison.AXES`; None: what suits the runs.
        points: where on it curves are told; empty: at round numbers.

    Returns:
        The two documents, then the figures, each as PNG and as SVG.
    """
    ranking = comparison.ranking
    axis = axis or default_axis(ranking)
    run_ids = [reading.run.id for row in ranking.rows for reading in row.readings]
    found = {run_id: store.artifact_json(run_id, names.ARTIFACT_ENVIRONMENT) for run_id in run_ids}
    for name in FIGURES:  # what an earlier report has drawn, and this one may not
        for ending in (".png", ".svg"):
            (folder / "figures" / f"{name}{ending}").unlink(missing_ok=True)
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
    return [*written, *figures, *(path.with_suffix(".svg") for path in figures)]


def log(store: Store, ranking: Ranking, files: Sequence[Path]) -> str:
    """Store a written report in the comparison's parent run; that run's id.

    A run that was made to hold it gets the summary as its description; a parent of the user's keeps its own.

    Args:
        store: the store.
        ranking: what the report is on.
        files: as `write` gives them; nothing else that lies beside them is stored.
    """
    run_id, ours = store.comparison_run([reading.run for row in ranking.rows for reading in row.readings])
    for path in files:
        store.log_file(run_id, path, ARTIFACTS if path.suffix in (".md", ".html") else f"{ARTIFACTS}/figures")
    if ours:
        advice = recommendation(ranking, careful_reading(subject_of(ranking)))
        summary = [f"**{advice.arm}** comes first; confidence: {advice.confidence}.", "", *verdict(ranking)]
        store.describe(run_id, "\n".join([*summary, "", f"The whole report: artifact `{ARTIFACTS}/report.html`."]))
    return run_id


def log_page(store: Store, ranking: Ranking, path: Path) -> str:
    """Store a gallery in the comparison's parent run; that run's id."""
    run_id, _ = store.comparison_run([reading.run for row in ranking.rows for reading in row.readings])
    store.log_file(run_id, path, GALLERY)
    return run_id

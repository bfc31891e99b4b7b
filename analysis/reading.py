"""From the store to a ranking: runs page by page, what cannot be ranked with the reason, curves for what is drawn."""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from rich.console import Console
from rich.progress import Progress, TextColumn

from analysis.comparison import CURVES_NEEDED, Comparison
from analysis.curves import Curve
from analysis.ranking import CURVES, At, Ranking, Reading, direction, nothing_ranked, rank, read, why_excluded
from analysis.runs import PARENT, Run
from analysis.settings import DERIVED, is_setting
from analysis.store import Store
from trainer import names
from trainer.errors import UserError

_AT_ONCE = 200
"""Runs whose curves are held together: memory stays flat in the number of runs."""


def read_ranking(
    store: Store, experiment: str | None, where: str | None, by: str, at: At, *, each: bool = False
) -> Ranking:
    """Rank what a store has.

    Args:
        store: the store.
        experiment: name; None: every run with a strategy.
        where: a filter of runs.
        by: metric.
        at: where in a run it is read.
        each: a row a run.

    Raises:
        UserError: the metric is not one to rank by, or no run has it; there is no run at all.
    """
    direction(by)  # a misspelt metric is told before anything is read
    readings: list[Reading] = []
    excluded: list[tuple[Run, str]] = []
    n_not_finite = 0
    shared = _Shared()
    found_runs = _with_progress(store.runs(experiment, where))
    while runs := list(islice(found_runs, _AT_ONCE)):
        reasons = {run.id: why_excluded(run) for run in runs}
        excluded += [(run, reason) for run in runs if (reason := reasons[run.id])]
        good = [run for run in runs if reasons[run.id] is None]
        curves: dict[str, dict[str, Curve]] = {}
        if at.kind != "final":
            curves = {metric: store.curves([run.id for run in good], metric) for metric in {*CURVES, by}}
        for run in good:
            own = {metric: of_runs[run.id] for metric, of_runs in curves.items()}
            n_not_finite += sum(curve.n_not_finite for curve in own.values())
            found = read(run, by, at, own)
            if isinstance(found, str):
                excluded.append((run, found))
            else:
                readings.append(replace(found, run=shared.lean(run)))
    if not readings and not excluded:
        raise UserError(
            str(store),
            "no run with a strategy tag" + (" for which --where holds" if where else ""),
            "at least one run of this trainer",
            "train something first: mlflow run . -e last6_lora" if not where else "loosen --where",
        )
    if not readings and any(reason == f"has no {by}" for _, reason in excluded):
        raise UserError("--by", by, "a metric that these runs have", "look at the metrics of a run in the MLflow UI")
    return rank(readings, by, at, excluded, each=each, n_not_finite=n_not_finite)


def read_comparison(store: Store, experiment: str | None, where: str | None, by: str, at: At) -> Comparison:
    """Rank what a store has, and read the curves of all that is ranked.

    Raises:
        UserError: as `read_ranking`, or nothing can be ranked.
    """
    ranking = read_ranking(store, experiment, where, by, at)
    if not ranking.rows:
        raise nothing_ranked(str(store))
    run_ids = [reading.run.id for row in ranking.rows for reading in row.readings]
    by_metric = {metric: store.curves(run_ids, metric) for metric in {*CURVES_NEEDED, by}}
    return Comparison(
        ranking, {run_id: {metric: of_runs[run_id] for metric, of_runs in by_metric.items()} for run_id in run_ids}
    )


class _Shared:
    """What many runs have in common, kept once: ten thousand of them else take a hundred megabytes."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._texts: dict[str, str] = {}
        self._settings: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}

    def lean(self, run: Run) -> Run:
        """The run with shared settings, without MLflow's own tags, and of its metrics those by domain alone."""
        own, settings = {}, []
        for key, value in run.params.items():
            pair = self._text(key), self._text(value)
            if is_setting(key) or key.startswith(DERIVED):
                settings.append(pair)
            else:
                own[pair[0]] = pair[1]
        common = self._settings.setdefault(tuple(settings), dict(settings))
        return replace(
            run,
            params=ChainMap(own, common),  # type: ignore[arg-type]  # read only, as the type of `params` says
            tags={
                self._text(k): self._text(v) for k, v in run.tags.items() if k == PARENT or not k.startswith("mlflow.")
            },
            metrics={self._text(k): v for k, v in run.metrics.items() if k.startswith(names.EVAL_LOSS_BY_DOMAIN)},
        )

    def _text(self, text: str) -> str:
        return self._texts.setdefault(text, text)


def _with_progress(runs: Iterable[Run]) -> Iterator[Run]:
    """A count on the terminal while pages of a large store come in."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.completed} runs"), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)
        for run in runs:
            yield run
            progress.advance(task)

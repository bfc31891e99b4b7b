"""What a run is here: what the store knows of it, and what is written of one that was trained elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer import names

PARENT = "mlflow.parentRunId"
"""Tag of a run below another; the name is MLflow's."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the store knows of one run, curves and artifacts apart."""

    id: str
    name: str
    experiment_id: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    started: int
    """Milliseconds since 1970."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """Metric -> its value at the highest step."""
    last_step: int = 0
    """Highest step of any metric."""
    experiment: str = ""
    """Name of its experiment."""

    @property
    def strategy(self) -> str:
        """The arm."""
        return self.tags.get(names.TAG_STRATEGY, "")

    @property
    def seed(self) -> str:
        """As text; empty where it is not known."""
        return self.tags.get(names.TAG_SEED, "")


@dataclass(frozen=True, slots=True)
class Imported:
    """A run that was trained elsewhere, as it is to be written."""

    key: str
    """Tells this run from any other that is imported; a second import with the same key adds nothing."""
    name: str
    note: str
    """Its description, in Markdown."""
    tags: Mapping[str, str]
    params: Mapping[str, str]
    rows: Sequence[tuple[str, int, int, float]]
    """(metric, step, time in milliseconds, value)."""

"""Results that others have published, from YAML to runs in MLflow: tagged as theirs, and as not measured by us."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from analysis.runs import Imported
from trainer import names
from trainer.config.places import experiments_dir
from trainer.errors import UserError

SOURCE = "published"

_DAY_SECONDS = 86_400


def published_files() -> list[Path]:
    """The files that are shipped, in `experiments/published/`."""
    return sorted((experiments_dir() / "published").glob("*.yaml"))


def published_runs(path: Path) -> list[Imported]:
    """The runs of one file; an arm each.

    Points of a curve that lie after a run's last step were not measured: they are left out, and its note says so.

    Raises:
        UserError: the file is not there or not such a file.
    """
    tree = _tree(path)
    try:
        return [_imported(tree, arm, run) for arm, run in tree["runs"].items()]
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise _not_such_a_file(path, error) from None


def _tree(path: Path) -> Any:
    """The file, with the sections that such a file has."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section in ("comparison", "date", "common", "printed", "runs"):
            tree[section]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise _not_such_a_file(path, error) from None
    return tree


def _not_such_a_file(path: Path, error: Exception) -> UserError:
    got = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(str(path), got, "a file such as experiments/published/stage3.yaml", "compare it with that one")


def _imported(tree: Mapping[str, Any], arm: str, run: Mapping[str, Any]) -> Imported:
    begin = datetime.combine(tree["date"], datetime.min.time(), UTC)
    per_step = run["days"] * _DAY_SECONDS / run["final_step"]

    def row(metric: str, step: int, value: float) -> tuple[str, int, int, float]:
        return metric, step, int(1000 * (begin.timestamp() + step * per_step)), float(value)

    curve = {step: value for step, value in run["eval_curve"].items() if step <= run["final_step"]}
    beyond = sorted(run["eval_curve"].keys() - curve.keys())
    evaluation, training = run["eval_loss"], run["train_loss"]
    rows = [row(names.EVAL_LOSS_SMOOTHED, step, value) for step, value in sorted(curve.items())]
    lowest = min(curve, key=curve.__getitem__)
    rows += [
        row(names.BEST_LOSS, run["final_step"], curve[lowest]),
        row(names.BEST_STEP, run["final_step"], lowest),
        row(names.EVAL_LOSS_SMOOTHED, evaluation["step"], evaluation["smoothed"]),
        row(names.EVAL_LOSS, evaluation["step"], evaluation["raw"]),
        row(names.TRAIN_LOSS_SMOOTHED, training["step"], training["smoothed"]),
        row(names.TRAIN_LOSS, training["step"], training["raw"]),
        row(names.GAP, run["final_step"], run["generalization_gap"]),
        row(names.TRAIN_SECONDS, run["final_step"], run["days"] * _DAY_SECONDS),
    ]
    claims = {key: value for key, value in tree["printed"].items() if key != "margins"}
    printed = {
        "margin": tree["printed"]["margins"].get(arm),
        "after_the_end": {step: run["eval_curve"][step] for step in beyond},
        "claims": claims,
    }
    note = f"Published as `{tree['comparison']}` on {tree['date']}; not measured by this project."
    if beyond:
        note += (
            f" The report also gives eval losses at steps {', '.join(map(str, beyond))}, after the run's last step "
            f"{run['final_step']}: they cannot be measurements and are left out."
        )
    return Imported(
        key=f"{tree['comparison']}/{arm}",
        name=f"{arm} (published)",
        note=note,
        tags={names.TAG_STRATEGY: arm, names.TAG_SOURCE: SOURCE, names.TAG_PRINTED: json.dumps(printed)},
        params={key: str(value) for key, value in {**tree["common"], **run["params"]}.items()},
        rows=rows,
    )

"""docs/metrics.md says what `trainer/names.py` says: metrics with unit and side, and every param, tag and artifact."""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import recorded
from trainer import names
from trainer.metrics import SPIKE_MADS, SPIKE_WINDOW

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
DOMAIN = names.EVAL_LOSS_BY_DOMAIN + "DOMAIN"
ALL = {**names.METRICS, **names.OF_STAGES, DOMAIN: names.metric(DOMAIN)}
OF_THE_DICTIONARY = {
    value for key, value in vars(names).items() if key.startswith(("TAG_", "ARTIFACT_")) and isinstance(value, str)
}
OF_PARAMS = {
    names.TRAINABLE_PARAMETERS, names.DTYPE, names.VISION_BLOCKS, names.VISION_STAGES, names.EFFECTIVE_BATCH_PACKS,
    names.IMAGE_PROCESSOR, names.SKIPPED_RECORDS,
}  # fmt: skip


def rows(header: str) -> Iterator[list[str]]:
    """The cells of all tables whose header begins with these words."""
    for table in re.findall(rf"^\| {re.escape(header)}.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_each_metric_stands_in_one_table_with_its_unit_side_and_kind() -> None:
    """None is missing, none is made up, none is there twice."""
    told = [(name.strip("`"), unit, better, kind) for name, unit, better, kind, *_ in rows("metric | unit")]
    wanted = [(name, of.unit, of.better or "neither", "exact" if of.exact else "measured") for name, of in ALL.items()]
    assert sorted(told) == sorted(wanted)


@pytest.mark.parametrize("header", ["tag |", "artifact |"])
def test_no_tag_or_artifact_is_made_up(header: str) -> None:
    """Each name in the first column is one that the code writes, or the file of a command."""
    others = {"halving.json", "ranking.txt", "report/", "gallery/", "champion/"}
    known = OF_THE_DICTIONARY | others | {f"{kind}_{names.ARTIFACT_PREDICTIONS}" for kind in ("best", "last")}
    told = {name for cells in rows(header) for name in re.findall(r"`([^`]+)`", cells[0])}
    assert told - known == {names.TAG_POINT + "KEY"} & told
    assert len(told) > 10


@pytest.mark.parametrize("name", sorted(OF_THE_DICTIONARY | OF_PARAMS))
def test_every_param_tag_and_artifact_is_named(name: str) -> None:
    """Whoever sees one in MLflow finds it on the page."""
    assert f"`{name}" in PAGE or f"_{name}`" in PAGE


def test_the_numbers_of_rules_are_those_of_the_code() -> None:
    """What counts as a spike."""
    (spikes,) = [cells for cells in rows("metric | unit") if cells[0] == f"`{names.LOSS_SPIKES}`"]
    assert f"the {SPIKE_WINDOW} rows" in spikes[-1] and f"{SPIKE_MADS:.0f} median absolute deviations" in spikes[-1]


def test_the_examples_are_those_of_the_recorded_arms() -> None:
    """Gaps, domains, vision gain and smoothed losses that the page draws conclusions from."""

    def of(arm: str, metric: str) -> float:
        return mean(run.metrics[metric] for run in recorded.runs() if run.strategy == arm)

    for arm, gap, clean in (("all_full", "0.125", "0.107"), ("all_lora", "0.105", "0.118")):
        assert (f"{of(arm, names.GAP):.3f}", f"{of(arm, names.GAP_CLEAN):.3f}") == (gap, clean)
    assert "(0.125 against 0.105)" in PAGE and "(0.107 against 0.118)" in PAGE
    ahead = {by: of("last6_lora", by) - of("all_full", by) for by in (names.EVAL_LOSS, names.EVAL_LOSS_SMOOTHED)}
    assert f"{ahead[names.EVAL_LOSS]:.4f} ahead" in PAGE
    assert f"and {ahead[names.EVAL_LOSS_SMOOTHED]:.4f} in the smoothed one" in PAGE
    card = names.EVAL_LOSS_BY_DOMAIN + "card"
    assert f"(`card`, {of('all_lora', card):.3f} against {of('frozen_vision', card):.3f})" in PAGE
    frozen, trained = of("frozen_vision", names.VISION_GAIN), of("all_lora", names.VISION_GAIN)
    assert f"{frozen:.2f} nats with a frozen tower and {trained:.2f} for `all_lora`" in PAGE

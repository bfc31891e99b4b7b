"""docs/real_model.md tells what docs/scaling.md says of memory and hours, in fewer cells, and reckons with it."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "real_model.md").read_text(encoding="utf-8")
SCALING = (DOCS / "scaling.md").read_text(encoding="utf-8")
SIZES = ("2B", "4B", "8B", "32B")
ARMS = ("frozen_vision", "last6_lora", "last6_full", "all_lora", "all_full")


def scaling(table: str, size: str, arm: str) -> list[str]:
    """The cells of one row of a table of scaling.md, behind model and arm."""
    part = SCALING.split(f"<!-- {table} -->")[1].split("<!-- end -->")[0]
    (row,) = re.findall(rf"^\| {size} \| {arm} \| (.+) \|$", part, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("arm", ARMS)
def test_memory_and_hours_are_those_of_the_scaling_page(arm: str) -> None:
    """Two packs a micro-batch, or one where two do not fit."""
    (row,) = re.findall(rf"^\| {arm} \| (.+ h) \|$", PAGE, re.MULTILINE)
    for size, cell in zip(SIZES, row.split(" | "), strict=True):
        _, two_packs, one_pack, *_ = scaling("memory", size, arm)
        packs, _, _, hours, *_ = scaling("time", size, arm)
        wanted = f"{two_packs}, {hours} h" if packs == "2" else f"(1) {one_pack}, {hours} h"
        assert cell == wanted, size


def test_weights_and_the_least_memory_are_those_of_the_scaling_page() -> None:
    """Of the parts, the base and the sum."""
    (row,) = re.findall(r"^\| weights in bfloat16, GB \| (.+) \|$", PAGE, re.MULTILINE)
    assert row.split(" | ") == [scaling("parts", size, "last6_lora")[1] for size in SIZES]
    assert f"The least that one pack takes is {scaling('parts', '4B', 'last6_lora')[-1]} GB" in PAGE


def test_what_is_reckoned_from_them_is_right() -> None:
    """Packs, ZeRO-2, and the hours of a run and of a comparison."""
    hours = {arm: float(scaling("time", "4B", arm)[3]) for arm in ARMS}
    of_all_full, of_last6 = scaling("memory", "4B", "all_full"), scaling("memory", "4B", "last6_lora")
    assert f"{of_last6[1]} to {of_last6[2]} GB (computed)" in PAGE
    assert f"{of_all_full[1]} GB a GPU become {of_all_full[3]}" in " ".join(PAGE.split())
    assert f"are then {50 * hours['last6_lora']:.1f} hours" in " ".join(PAGE.split())
    three = sum(hours[arm] for arm in ("frozen_vision", "last6_lora", "all_lora"))
    assert f"are about {3 * 10 * three:.0f} hours of one H200" in " ".join(PAGE.split())

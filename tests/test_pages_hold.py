"""docs/data.md, docs/ms_swift.md and docs/strategies.md list what the code has: keys, operations, arms, warnings."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.architectures import SIZES, qwen3_vl_config
from trainer.build import plan_from
from trainer.config.augmentation import PARAMS, Augmentation, Params
from trainer.config.compat import NO_EFFECT
from trainer.config.load import load
from trainer.config.messages import field_of
from trainer.config.parts import RAW_STRATEGY_KEYS, Tuner
from trainer.config.places import experiments_dir
from trainer.data import records
from trainer.data.geometry import KINDS
from trainer.data.suspicions import CHECKS
from trainer.model import parameter_shapes
from trainer.raw_strategy import FREEZE
from trainer.stages import spans
from trainer.strategy import resolve_blocks

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("data", "ms_swift", "strategies")}
ARMS = sorted(path.stem for path in experiments_dir().glob("*_*.yaml"))


def table(page: str, name: str) -> list[list[str]]:
    """The rows below the head of the table that stands between `<!-- name -->` and `<!-- end -->`."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", PAGES[page], re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def quoted(text: str) -> list[str]:
    """Everything between back-ticks."""
    return re.findall(r"`([^`]+)`", text)


def keys(page: str, name: str, column: int = 0) -> list[str]:
    """What one column of a table quotes, row by row."""
    return [key for row in table(page, name) for key in quoted(row[column])]


def heads(page: str, name: str) -> list[str]:
    """The columns of a table."""
    (line,) = re.findall(rf"<!-- {name} -->\n(.*)", PAGES[page])
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- data.md


def test_every_key_that_is_read_of_a_record_is_in_the_tables() -> None:
    """And no other: a key that is told and not read would be one more silent mistake."""
    read = set(re.findall(r'tree(?:\.get\(|\[)"(\w+)"', Path(records.__file__).read_text(encoding="utf-8")))
    assert set(keys("data", "record keys")) | set(keys("data", "object keys")) == read | set(KINDS)


def test_the_bounds_of_records_are_those_that_are_told() -> None:
    """How many objects, and how often a record may come."""
    assert f"1 to {records.MAX_OBJECTS:,}" in PAGES["data"] and f"at most {records.MAX_WEIGHT};" in PAGES["data"]


def test_every_warning_of_validate_is_told() -> None:
    """By the name that it has in JSON, in the order in which they come."""
    assert [row[0].strip("`") for row in table("data", "warnings")] == [*CHECKS]


def test_every_augmentation_operation_is_told_with_its_parameters() -> None:
    """Names quoted in the third column are parameters of the row's operations."""
    told = {name: quoted(row[2]) for row in table("data", "operations") for name in quoted(row[0])}
    common, crop = set(Params.model_fields), {"min_coverage", "completeness_threshold", "min_objects", "skip_if_line"}
    of_center = told.pop("center_crop")  # "the same four"
    assert set(of_center) | crop == set(PARAMS["center_crop"].model_fields) - common
    assert {name: set(params) for name, params in told.items()} == {
        name: set(params.model_fields) - common for name, params in PARAMS.items() if name != "center_crop"
    }


def test_every_key_of_augmentation_is_told() -> None:
    """Each begins a row."""
    assert set(Augmentation.model_fields) <= set(re.findall(r"^\| `(\w+)` \|", PAGES["data"], re.MULTILINE))


# --- ms_swift.md


def test_every_key_without_effect_is_told() -> None:
    """None that has one."""
    assert set(keys("ms_swift", "no effect")) == set(NO_EFFECT)


def test_every_key_of_the_raw_form_is_told_with_what_it_is_unset() -> None:
    """The three `freeze_` keys count as what `FREEZE` says."""
    assert set(keys("ms_swift", "raw keys")) == set(RAW_STRATEGY_KEYS)
    unset = {row[0].strip("`"): row[1] for row in table("ms_swift", "raw keys")}
    assert {key: unset[key] for key, _ in FREEZE.values()} == {key: str(said).lower() for key, said in FREEZE.values()}


# --- strategies.md


def test_every_shipped_strategy_is_told_as_it_is() -> None:
    """Blocks resolved against both depths, method, learning rate and accumulation."""
    rows = {row[0].strip("`"): row[1:] for row in table("strategies", "strategies")}
    assert sorted(rows) == ARMS
    for arm, (blocks, method, vit_lr, accumulation, _) in rows.items():
        config = load(arm).config
        vision = config.strategy.vision
        written = [spec for _, spec in vision.stages]
        assert blocks.split(" (")[0] == ", ".join(written)
        if "(" in blocks:
            ends = [spans(resolve_blocks(written[-1], n, where="", noun="")) for n in (24, 27)]
            assert blocks == f"{written[-1]} ({'; '.join(ends)})"
        assert method == vision.method and accumulation == str(config.training.gradient_accumulation_steps)
        assert (float(vit_lr) == config.training.vit_lr) if vit_lr else (vision.method == "frozen")


@pytest.mark.parametrize(("size", "column"), [("4b", 1), ("8b", 5)])
def test_what_trains_of_a_real_model_is_what_the_plan_counts(size: str, column: int) -> None:
    """Millions, by part."""
    shapes = parameter_shapes(f"random:{size}")
    for row in table("strategies", "trainable"):
        counts = plan_from(load(row[0].strip("`")), shapes)[0].trainable_parameters()
        assert row[column : column + 4] == [f"{counts[key] / 1e6:.1f}" for key in ("vision", "aligner", "llm", "total")]


def depths() -> Iterator[tuple[str, ...]]:
    """What the page says of each size."""
    sizes = heads("strategies", "depths")[1:]
    yield from zip(sizes, *(row[1:] for row in table("strategies", "depths")), strict=True)


def test_depths_and_taps_are_those_of_the_models() -> None:
    """And what last-6 and last-2 mean there."""
    for size, blocks, taps, layers, last_six, last_two in depths():
        config = qwen3_vl_config(size)
        vision, text = config.vision_config, config.text_config
        assert (int(blocks), int(layers)) == (vision.depth, text.num_hidden_layers)
        assert taps == ", ".join(map(str, vision.deepstack_visual_indexes))
        assert last_six == spans(resolve_blocks("last-6", vision.depth, where="", noun=""))
        assert last_two == spans(resolve_blocks("last-2", text.num_hidden_layers, where="", noun=""))
    assert [size.lower() for size, *_ in depths()] == [*SIZES]


def test_blocks_resolve_as_the_page_says() -> None:
    """In either depth."""
    for written, *resolved in table("strategies", "spans"):
        spec = written.strip("`")
        assert resolved == [spans(resolve_blocks(spec, n, where="", noun="blocks")) for n in (24, 27)]


def test_every_key_of_the_strategy_section_and_of_lora_is_told() -> None:
    """The raw form has a table of its own."""
    of_tuner = {f"tuner.{key}" for key in Tuner.model_fields if key not in RAW_STRATEGY_KEYS}
    of_strategy = {"vision.blocks", "vision.method", "vision.schedule", "aligner.method", "llm.layers", "llm.method"}
    assert set(keys("strategies", "strategy keys")) == of_tuner | {f"strategy.{key}" for key in of_strategy}


# --- all three


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_key_that_a_page_names_is_a_key(page: str) -> None:
    """In the schema, or accepted without effect."""
    sections = "model|template|prompts|tuner|training|data|deepspeed|custom|strategy|launch|tracking"
    named = set(re.findall(rf"`(?:-P )?((?:{sections})\.[a-z_.]+?)(?:[=:][^`]*)?`", PAGES[page]))
    files = {name for name in named if name.endswith((".md", ".jsonl", ".yaml", ".png"))}
    others = {"data.train_digest", "data.val_digest", "model.visual.merger"}  # tags of a run, a module
    assert not [key for key in sorted(named - files - others) if not field_of(key) and key not in NO_EFFECT]

"""Writes the model card of an export: what it is, how it was trained, what was measured, under which licenses."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from trainer import names
from trainer.inference.recipe import Recipe

CARD = "README.md"
UNKNOWN = "unknown"

_LICENSES = "The license of a trained model follows from those of its base and of its data."


def write_card(
    folder: Path,
    recipe: Recipe,
    form: str,
    use: str,
    figures: Mapping[str, float],
    *,
    checked: str,
    license_name: str,
    data_license: str,
) -> None:
    """Write `README.md` with the fields of Hugging Face's model cards (Mitchell et al. 2019).

    Args:
        folder: of the export.
        recipe: how it was trained.
        form: what the folder holds.
        use: lines of code or a command.
        figures: metric -> value at this checkpoint; may be empty.
        checked: what of the weights was checked.
        license_name: of the weights.
        data_license: of the training data.
    """
    fields = {
        "base_model": recipe.base_model,
        "library_name": "transformers" if recipe.merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "license": license_name,
        "tags": ["qwen3-vl", "dense-captioning", recipe.strategy],
    }
    lines = [
        "---",
        yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {recipe.strategy}, seed {recipe.seed}",
        "",
        f"{form} Trained from `{recipe.base_model}` (weights {recipe.base_digest}) and saved after optimizer step "
        f"{recipe.step}. It answers with the objects of an image as JSON, with coordinates in {_frame(recipe)}, to "
        f"prompts of scheme {recipe.scheme} in `{recipe.language}`.",
        "",
        "```",
        use,
        "```",
        "",
        "## Figures",
        "",
        *_table(figures),
        "",
        "## Where it comes from",
        "",
        "| | |",
        "| --- | --- |",
        f"| training data, SHA-256 | `{recipe.train_digest}` |",
        f"| validation data, SHA-256 | `{recipe.val_digest}` |",
        f"| base weights, SHA-256 | `{recipe.base_digest}` |",
        f"| run in MLflow | `tags.{names.TAG_KEY} = '{recipe.training_key}'` |",
        f"| checked | {checked} |",
        f"| license of the weights | {license_name} |",
        f"| license of the training data | {data_license} |",
        "",
        _LICENSES + (" Ask before you pass it on." if UNKNOWN in (license_name, data_license) else ""),
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _frame(recipe: Recipe) -> str:
    units = {"norm1000": "thousandths of its sides", "norm100": "hundredths of its sides", "none": "pixels"}
    return units[recipe.emit_norm]


def _table(figures: Mapping[str, float]) -> list[str]:
    if not figures:
        return ["Not known here: the run's MLflow store could not be asked."]
    rows = [f"| `{name}` | {value:.6g} | {names.metric(name).unit} |" for name, value in figures.items()]
    return ["On the validation set, at this checkpoint:", "", "| metric | value | unit |", "| --- | --- | --- |", *rows]

"""Exports a checkpoint: merged weights, the adapter alone, or a model that MLflow serves; each with a model card."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from trainer.checkpoint import write_folder
from trainer.errors import UserError
from trainer.inference.card import UNKNOWN, write_card
from trainer.inference.merge import Merged, license_of, write_merged
from trainer.inference.recipe import Recipe, recipe_of

Form = Literal["merged", "adapter", "mlflow"]

_POCKET_LICENSE = "apache-2.0"
"""Of the built-in base, as of this project."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: where, how large, and what of it was checked."""

    folder: Path
    size_bytes: int
    checked: str


def export(
    checkpoint: Path,
    folder: Path,
    form: Form,
    *,
    base: str = "",
    dtype: str = "",
    license_name: str = "",
    data_license: str = "",
) -> Exported:
    """Write a checkpoint in another form, whole or not at all.

    Args:
        checkpoint: of an adapter.
        folder: to write to; not there yet, or empty.
        form: `merged`, `adapter` or `mlflow`.
        base: where the base model is now; empty: where it was in training.
        dtype: of merged weights, `float32` or `bfloat16`; empty: as the base was held in training.
        license_name: of the weights; empty: that of the base's own card.
        data_license: of the training data; empty: unknown.

    Raises:
        UserError: something is wrong with the checkpoint, the base or the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            "--out", f"{folder}, which is there", "a new folder, or an empty one", "choose another name, or remove it"
        )
    recipe = recipe_of(checkpoint)
    if recipe.merged and form != "mlflow":
        raise UserError(str(checkpoint), "a merged model", "an adapter", "export the checkpoint of the run")
    if dtype and (recipe.merged or form == "adapter"):
        raise UserError(
            "--dtype", f"{dtype}, for weights that are not merged here", "a checkpoint with --form merged or mlflow",
            "leave it out, or export the checkpoint of the run",
        )  # fmt: skip
    recipe = recipe.on(base)
    license_name = license_name or _license(recipe)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
            made = Path(aside) / "made"
            checked = _write(checkpoint, recipe, made, form, dtype or recipe.torch_dtype)
            card = replace(recipe, merged=form != "adapter")
            use = _use(form, folder)
            write_card(
                made, card, _FORMS[form], use, _figures(recipe), checked=checked,
                license_name=license_name, data_license=data_license or UNKNOWN,
            )  # fmt: skip
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        raise UserError(
            "--out",
            f"{folder}: {error.strerror or error}",
            "a folder that can be written, with room",
            "choose another place, or make room",
        ) from None
    return Exported(folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), checked)


_FORMS: dict[Form, str] = {
    "merged": "Whole weights: base and adapter merged.",
    "adapter": "An adapter alone: LoRA matrices and the modules that were trained whole, in PEFT's format.",
    "mlflow": "A model that MLflow serves, base and adapter merged.",
}


def _write(checkpoint: Path, recipe: Recipe, folder: Path, form: Form, dtype: str) -> str:
    """Write one form into a new folder; what of it was checked, in words."""
    if form == "adapter":
        shutil.copytree(checkpoint, folder)
        return "every file against the SHA-256 that training has written"
    if form == "merged":
        return _merged(checkpoint, recipe, folder, dtype)
    from trainer.inference.served import save_served  # MLflow, which takes seconds

    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        model = checkpoint
        checked = "every file against its SHA-256"
        if not recipe.merged:
            model = Path(aside) / "model"
            checked = _merged(checkpoint, recipe, model, dtype)
        save_served(model, folder)
    return checked


def _merged(checkpoint: Path, recipe: Recipe, folder: Path, dtype: str) -> str:
    done = Merged()

    def fill(aside: Path) -> None:
        nonlocal done
        done = write_merged(checkpoint, recipe, aside, dtype=getattr(torch, dtype))

    write_folder(folder, fill, {"step": recipe.step, **replace(recipe, merged=True, torch_dtype=dtype).facts()})
    return (
        f"every tensor against base and adapter: {done.untouched} as in the base, {done.copied} trained whole, "
        f"{done.added} with LoRA added"
    )


def _figures(recipe: Recipe) -> dict[str, float]:
    from trainer.stored import figures  # MLflow, which takes seconds

    return figures(recipe.training_key, recipe.step)


def _license(recipe: Recipe) -> str:
    known = _POCKET_LICENSE if recipe.base_model == "pocket" else license_of(recipe.base_model)
    return known or UNKNOWN


def _use(form: Form, folder: Path) -> str:
    """How the export is used, for its card."""
    match form:
        case "merged":
            return (
                "from transformers import AutoModelForImageTextToText\n"
                f'model = AutoModelForImageTextToText.from_pretrained("{folder.name}")\n'
                f"# or, on images: python -m trainer predict {folder.name} photos/"
            )
        case "adapter":
            return (
                "from peft import PeftModel\n"
                f'model = PeftModel.from_pretrained(base, "{folder.name}")\n'
                f"# or, on images: python -m trainer predict {folder.name} photos/"
            )
        case "mlflow":
            return (
                f"mlflow models serve -m {folder.name} --env-manager local --port 5001\n"
                "curl localhost:5001/invocations -H 'Content-Type: application/json' --data-binary @- \\\n"
                '     < <(printf \'{"dataframe_split": {"columns": ["image"], "data": [["%s"]]}}\' '
                "\"$(base64 < photo.jpg | tr -d '\\n')\")"
            )

"""`export`: the weights of a checkpoint in the form that others use."""

from pathlib import Path

import click

from trainer import collector
from trainer.inference.predict_command import base_option
from trainer.options import OneOf, quiet_libraries

_HELP = """
\b
python -m trainer export models:/qwen3vl-vision@champion --out merged
python -m trainer export models:/qwen3vl-vision@champion --form mlflow --out served
mlflow models serve -m served --env-manager local --port 5001
python -m trainer export output/last6_lora-seed17-1a2b3c4d --form adapter --out adapter     of a run's folder
"""
_FORMS = ("merged", "adapter", "mlflow")


@click.command(epilog=_HELP, short_help="Write a checkpoint in the form that others use.")
@click.argument("source")
@base_option
@click.option("--form", type=click.Choice(_FORMS), default="merged", show_default=True, help="What is written.")
@click.option("--out", metavar="FOLDER", required=True, help="Where it is written; must not be there yet, or be empty.")
@click.option(
    "--dtype",
    type=OneOf(["float32", "bfloat16"]),
    default="",
    show_default="as in training",
    help="Number format of merged weights.",
)
@click.option(
    "--license",
    "license_name",
    metavar="NAME",
    default="",
    show_default="that of the base's card",
    help="License of the weights, for the card.",
)
@click.option(
    "--data_license",
    metavar="NAME",
    default="",
    show_default="unknown",
    help="License of the training data, for the card.",
)
def export(source: str, base: str, form: str, out: str, dtype: str, license_name: str, data_license: str) -> None:
    """Write the model of SOURCE as merged weights, as its adapter alone, or as a model that MLflow serves.

    SOURCE is the folder of a run or of one of its checkpoints, the id of an MLflow run, or a registered model such as
    models:/qwen3vl-vision@champion.

    merged: a folder in Hugging Face layout that transformers loads like any other. Each of its tensors is read back and
    held against base and adapter; the vision weights that were trained whole are in it, not only the LoRA ones.

    adapter: the checkpoint's files, which PEFT loads on the base model.

    mlflow: `mlflow models serve` answers images, sent as base64, with their objects.

    A model card with figures, digests of data and base, and license fields lies beside each.
    """
    with collector.at_rest():
        quiet_libraries()
        from trainer.inference.checkpoint_source import checkpoint_of
        from trainer.inference.export import export as exported
    done = exported(
        checkpoint_of(source), Path(out), form, base=base, dtype=dtype,  # type: ignore[arg-type]  # click has checked it
        license_name=license_name, data_license=data_license,
    )  # fmt: skip
    click.echo(f"{done.folder}: {done.size_bytes / 1e6:.1f} MB; checked: {done.checked}")

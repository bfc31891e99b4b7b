"""`export`: the weights of a checkpoint in the form that others use."""

from pathlib import Path

import click

from trainer import collector
from trainer.inference.predict_command import source_options
from trainer.options import quiet_libraries

_HELP = """
\b
python -m trainer export output/last6_lora-seed17-1a2b3c4d/best --out merged
python -m trainer export models:/qwen3vl-vision@champion --form mlflow --out served
mlflow models serve -m served --env-manager local --port 5001
"""
_FORMS = ("merged", "adapter", "mlflow")


@click.command(epilog=_HELP)
@source_options
@click.option("--form", type=click.Choice(_FORMS), default="merged", show_default=True, help="What is written.")
@click.option("--out", required=True, help="Folder to write; it must not be there yet.")
@click.option(
    "--dtype",
    type=click.Choice(["", "float32", "bfloat16"]),
    default="",
    help="Of merged weights. [default: as in training]",
)
@click.option("--license", "license_name", default="", help="Of the weights. [default: that of the base's card]")
@click.option("--data_license", default="", help="Of the training data, for the card.")
def export(
    source: str, base: str, device: str, form: str, out: str, dtype: str, license_name: str, data_license: str
) -> None:
    """Write the model of SOURCE as merged weights, as its adapter alone, or as a model that MLflow serves.

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

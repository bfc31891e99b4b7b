"""`predict`: captions images with a trained adapter."""

from pathlib import Path
from typing import Any

import click

from trainer import collector
from trainer.options import is_true, quiet_libraries

_HELP = """
\b
python -m trainer predict output/last6_lora-seed17-1a2b3c4d/best photos/
python -m trainer predict models:/qwen3vl-vision@champion photos/ --out labelled
"""


def source_options(command: Any) -> Any:
    """SOURCE, and where and on what it is loaded."""
    options = [
        click.argument("source"),
        click.option("--base", default="", help="Where the base model is now. [default: where it was in training]"),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1. [default: a GPU where there is one]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=_HELP)
@source_options
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="predictions", show_default=True, help="Folder for predictions.jsonl and pictures/.")
@click.option("--batch_size", type=click.IntRange(1, 4096), default=16, show_default=True, help="Images at once.")
@click.option("--max_new_tokens", type=click.IntRange(1), help="Of an answer. [default: as training had room for]")
@click.option("--pictures", default="true", show_default=True, help="Whether images are drawn with their labels.")
def predict(
    source: str,
    images: tuple[Path, ...],
    base: str,
    device: str,
    out: str,
    batch_size: int,
    max_new_tokens: int | None,
    pictures: str,
) -> None:
    """Caption IMAGES, files or folders, with the adapter of SOURCE.

    SOURCE is a checkpoint's folder, the id of an MLflow run, or a registered model such as
    models:/qwen3vl-vision@champion. The result is predictions.jsonl, a line an image with its objects in pixels, in
    the form of training records; and each image with its objects drawn. What an interrupted command has done is kept.

    An answer that is cut or broken is mended where it can be; how many were is told, and stands with each image. The
    status is 2 where an image could not be read; the others have their answers.
    """
    drawn = is_true("--pictures", pictures)
    with collector.at_rest():
        quiet_libraries()
        from trainer.inference.show_predictions import show_predictions
    if show_predictions(
        source, images, Path(out), base=base, device=device, batch_size=batch_size,
        max_new_tokens=max_new_tokens, pictures=drawn,
    ):  # fmt: skip
        raise SystemExit(2)

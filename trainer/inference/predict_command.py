"""`predict`: captions images with a trained adapter."""

from pathlib import Path

import click

from trainer import collector
from trainer.options import is_true, quiet_libraries

_HELP = """
\b
python -m trainer predict models:/qwen3vl-vision@champion photos/
python -m trainer predict models:/qwen3vl-vision@champion photos/ --out labelled --pictures false
python -m trainer predict output/last6_lora-seed17-1a2b3c4d photos/     the best checkpoint of a run's folder
"""

base_option = click.option(
    "--base", metavar="MODEL", default="", show_default="where it was in training", help="Where the base model is now."
)


@click.command(epilog=_HELP, short_help="Caption images with a trained adapter.")
@click.argument("source")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@base_option
@click.option(
    "--device",
    metavar="[auto|cpu|cuda|cuda:N]",
    default="auto",
    show_default=True,
    help="auto: a GPU where there is one.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    default="predictions",
    show_default=True,
    help="Where predictions.jsonl and pictures/ are written.",
)
@click.option(
    "--batch_size",
    metavar="N",
    type=click.IntRange(1, 4096),
    default=16,
    show_default=True,
    help="Images that are captioned at once.",
)
@click.option(
    "--max_new_tokens",
    metavar="N",
    type=click.IntRange(1),
    show_default="as training had room for",
    help="Tokens of an answer at most.",
)
@click.option(
    "--pictures",
    metavar="[true|false]",
    default="true",
    show_default=True,
    help="Whether images are drawn with their labels.",
)
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

    SOURCE is the folder of a run or of one of its checkpoints, the id of an MLflow run, or a registered model such as
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

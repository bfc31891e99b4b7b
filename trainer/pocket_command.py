"""`pocket-base`: trains the built-in base model again."""

import click

from trainer.options import quiet_libraries

_HELP = """
\b
python -m trainer pocket_base
python -m trainer run last6_lora --model output/pocket_base     trains on it
"""


@click.command("pocket_base", epilog=_HELP, short_help="Train the built-in base model again.")
@click.option(
    "--output_dir", metavar="FOLDER", default="output/pocket_base", show_default=True, help="Where it is written."
)
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights: about 25 minutes on two cores.

    A folder in Hugging Face layout is written, with the figures of the model in its pocket.json; a run of MLflow gets
    the same figures. The base model that comes with this project stays as it is.
    """
    quiet_libraries()
    from trainer.begin import open_aside
    from trainer.facts import log_base
    from trainer.pocket import train_base

    with open_aside("pocket_base") as tracker:
        log_base(tracker, train_base(output_dir))

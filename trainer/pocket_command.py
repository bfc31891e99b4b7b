"""`pocket-base`: trains the built-in base model again."""

import click

from trainer.options import quiet_libraries


@click.command("pocket-base")
@click.option("--output_dir", default="output/pocket_base", show_default=True, help="Folder for the new weights.")
def pocket_base(output_dir: str) -> None:
    """Train the built-in base model again, from random weights (its figures are in its pocket.json)."""
    quiet_libraries()
    from trainer.begin import open_aside
    from trainer.facts import log_base
    from trainer.pocket import train_base

    with open_aside("pocket_base") as tracker:
        log_base(tracker, train_base(output_dir))

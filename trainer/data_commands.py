"""Commands on data: `validate`, `preview` and `convert`."""

from pathlib import Path
from typing import Any

import click

from trainer import collector
from trainer.options import EXTRA, OVERRIDES_HELP, config_options, quiet_libraries, resolve, tell

_BAD_DATA = 2

_CONVERT_HELP = """
\b
python -m trainer convert coco/annotations/instances_val2017.json --images coco/val2017 --to coco/val.jsonl
python -m trainer convert data/swift.jsonl --to data/train.jsonl --domain street
"""


@click.command(context_settings=EXTRA, epilog=OVERRIDES_HELP)
@config_options
@click.option("--format", "form", type=click.Choice(["table", "json", ""]), help="What is printed. [default: table]")
@click.option("--out", help="Picture to draw too, ending in .png, .svg or .pdf. [default: nothing is drawn]")
def validate(context: click.Context, config: str, profile: str | None, form: str, out: str, **short: Any) -> None:
    """Check all records and print their statistics: objects, types, token lengths, packs, what would be too long.

    Every bad record is named, of all files; the status is 2 where training would refuse one, else 0. Warnings tell what
    is legal and probably not meant: images of validation in training, duplicates, types in two spellings and more.
    """
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    with collector.at_rest():
        quiet_libraries()
        from trainer.show_data import show_validation
    if errors := show_validation(resolved, form or "table", Path(out) if out else None):
        click.echo("\n".join(f"error: {error}" for error in errors), err=True)
        raise SystemExit(_BAD_DATA)


@click.command(context_settings=EXTRA, epilog=OVERRIDES_HELP)
@config_options
@click.option("--records", type=click.IntRange(1, 100), default=8, show_default=True, help="Rows: records to show.")
@click.option("--variants", type=click.IntRange(1, 10), default=3, show_default=True, help="Epochs to show each in.")
@click.option("--out", default="preview.png", show_default=True, help="File to write: .png, .svg or .pdf.")
def preview(
    context: click.Context, config: str, profile: str | None, records: int, variants: int, out: str, **short: str | None
) -> None:
    """Draw training records before and after augmentation, with their labels, and the text that the model learns."""
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    with collector.at_rest():
        quiet_libraries()
        from trainer.preview import show_preview
    show_preview(resolved, Path(out), n_records=records, n_variants=variants)


@click.command(epilog=_CONVERT_HELP)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "out", required=True, type=click.Path(path_type=Path), help="The JSONL file to write.")
@click.option("--format", "form", type=click.Choice(["coco", "swift"]), help="What SOURCE is. [default: seen from it]")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images. [default: that of SOURCE]")
@click.option("--geometry", "shape", type=click.Choice(["bbox", "poly"]), help="Of COCO's two. [default: bbox]")
@click.option("--domain", help="Domain of every record: its loss is reported apart.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def convert(source: Path, out: Path, **options: Any) -> None:
    """Convert COCO detection JSON, or ms-swift's grounding JSONL, to records.

    `desc` is the name of the COCO category, or ms-swift's ref. What cannot be converted (crowds, points, boxes outside
    their image or without area, images without objects or of another size than said) is left out, counted and named.
    Image paths are written relative to the new file, which is read once as training will read it.
    """
    from trainer import convert as conversion

    conversion.show(conversion.convert(source, out, **options))


ALL = (validate, preview, convert)

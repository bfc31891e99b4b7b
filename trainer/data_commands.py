"""Commands on data: `validate`, `preview` and `convert`."""

from pathlib import Path
from typing import Any

import click

from trainer import collector
from trainer.options import EXTRA, OVERRIDES_HELP, OneOf, config_options, quiet_libraries, resolve, tell

_BAD_DATA = 2

_VALIDATE_HELP = f"""
\b
python -m trainer validate last6_lora
python -m trainer validate last6_lora --train_jsonl data/train.jsonl --val_jsonl data/val.jsonl --out data.png
python -m trainer validate last6_lora --format json
{OVERRIDES_HELP}"""
_PREVIEW_HELP = f"""
\b
python -m trainer preview last6_lora
python -m trainer preview last6_lora --records 12 --variants 2 --out sheet.png --custom.augmentation.mode clean
{OVERRIDES_HELP}"""
_CONVERT_HELP = """
\b
python -m trainer convert coco/annotations/instances_val2017.json --images coco/val2017 --to coco/val.jsonl
python -m trainer convert data/swift.jsonl --to data/train.jsonl --domain street
"""


@click.command(context_settings=EXTRA, epilog=_VALIDATE_HELP, short_help="Check records and print their statistics.")
@config_options
@click.option(
    "--format", "form", type=OneOf(["table", "json"]), default="table", show_default=True, help="What is printed."
)
@click.option(
    "--out", metavar="FILE", show_default="none is drawn", help="Picture to draw too, ending in .png, .svg or .pdf."
)
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


@click.command(context_settings=EXTRA, epilog=_PREVIEW_HELP, short_help="Draw training records, augmented too.")
@config_options
@click.option(
    "--records", metavar="N", type=click.IntRange(1, 100), default=8, show_default=True, help="Rows: records to show."
)
@click.option(
    "--variants", metavar="N", type=click.IntRange(1, 10), default=3, show_default=True, help="Epochs to show each in."
)
@click.option(
    "--out", metavar="FILE", default="preview.png", show_default=True, help="File to write: .png, .svg or .pdf."
)
def preview(
    context: click.Context, config: str, profile: str | None, records: int, variants: int, out: str, **short: str | None
) -> None:
    """Draw training records before and after augmentation, with their labels, and the text that the model learns.

    One picture is written: a row a record, as it is on disk and as the first epochs show it. Nothing is trained.
    """
    resolved = resolve(context, config, profile, short)
    tell(resolved)
    with collector.at_rest():
        quiet_libraries()
        from trainer.preview import show_preview
    show_preview(resolved, Path(out), n_records=records, n_variants=variants)


@click.command(epilog=_CONVERT_HELP, short_help="Turn COCO or ms-swift files into records.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "out", metavar="FILE", required=True, type=click.Path(path_type=Path), help="JSONL to write.")
@click.option(
    "--format", "form", type=click.Choice(["coco", "swift"]), show_default="seen from it", help="What SOURCE is."
)
@click.option(
    "--images",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    show_default="that of SOURCE",
    help="Where the images are.",
)
@click.option(
    "--geometry", "shape", type=click.Choice(["bbox", "poly"]), show_default="bbox", help="Which of COCO's two to take."
)
@click.option("--domain", metavar="NAME", help="Domain of every record: its loss is reported apart.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def convert(source: Path, out: Path, **options: Any) -> None:
    """Convert COCO detection JSON, or ms-swift's grounding JSONL, to records.

    `desc` is the name of the COCO category, or ms-swift's ref. What cannot be converted (crowds, points, boxes outside
    their image or without area, images without objects or of another size than said) is left out, counted and named.
    Image paths are written relative to the new file, which is read once as training will read it.
    """
    from trainer import convert as conversion

    conversion.show(conversion.convert(source, out, **options))

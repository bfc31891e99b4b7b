"""Shows training samples before and after augmentation, and the text that the model reads and learns, on one sheet."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
from rich.console import Console
from rich.progress import track

from trainer import build
from trainer.config.resolved import Resolved
from trainer.data.answer import in_order
from trainer.data.augment import outline
from trainer.data.geometry import bounding_box, from_left_end
from trainer.data.loader import SampleSet
from trainer.data.records import Object, Record
from trainer.data.template import Encoder, Sample
from trainer.data.turns import Showing, Turn, shown
from trainer.data.warp import Warp, moved
from trainer.data_figure import check_out
from trainer.datasets import spread
from trainer.errors import UserError
from trainer.labels import Label
from trainer.lettering import Lettering
from trainer.sheet import Cell, Panel, Passage, Row, Watch, draw, style

_NAMED, _NAME = 3, 30
"""Labels that a note on a cell names, more are counted; letters of a name."""
_ON_DISK = "on disk"
_SHIFT = 0.5
"""Pixels by which a shape must differ from the whole one to be called cut."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a sheet has shown.

    Attributes:
        headline: in words.
        missing: letters that no font here has.
    """

    headline: str
    missing: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the sheet, a line each."""
        if not self.missing:
            return ()
        some = " ".join(self.missing[:12]) + (" ..." if len(self.missing) > 12 else "")
        return (f"no font here has {some}, drawn as boxes; install one that has, such as Noto's of that script",)


def show_preview(resolved: Resolved, out: Path, *, n_records: int, n_variants: int) -> None:
    """Draw training samples of a configuration, and print what was drawn and where it is.

    Args:
        resolved: the configuration; no weights are loaded.
        out: file to write or to replace; its ending says the format.
        n_records: rows at most.
        n_variants: epochs in which each sample is shown, where the configuration has an augmentation.

    Raises:
        UserError: `out` cannot be written, or whatever `trainer run` would refuse before it loads weights.
    """
    check_out(out)
    if not out.parent.is_dir():
        raise _no_out(out, f"{out.parent}: no such folder")
    prepared = build.prepare(resolved)
    console, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)

    def watch(rows: list[object]) -> Iterator[object]:
        yield from track(rows, "preview", console=errors, transient=True, disable=not errors.is_terminal)

    try:
        done = save_preview(
            prepared.samples, out, name=prepared.data.train.path.name, mode=resolved.config.custom.augmentation.mode,
            n_records=n_records, n_variants=n_variants, watch=watch,
        )  # fmt: skip
    except OSError as error:
        raise _no_out(out, error.strerror or str(error)) from None
    for note in done.notes:
        errors.print(f"note: {note}", markup=False)
    console.print(f"{out}: {done.headline}", markup=False)


def save_preview(
    samples: SampleSet,
    out: Path,
    *,
    name: str,
    mode: str,
    n_records: int,
    n_variants: int,
    watch: Watch = iter,
) -> Preview:
    """Draw samples of the training set, evenly spread over its file, into a file.

    Args:
        samples: of training.
        out: file to write or to replace; its ending (.png, .svg, .pdf) says the format.
        name: of the file that the records come from.
        mode: of the augmentation, in words.
        n_records: samples to show at most; 1 or more.
        n_variants: epochs in which each is shown, the first ones; 1 or more.
        watch: passes on the rows while they are made and drawn, to whoever shows progress.

    Returns:
        What was drawn.

    Raises:
        OSError: the file cannot be written.
        DataError: an image has gone since the records were checked.
    """
    rows = rows_of(samples, n_records, n_variants, watch)
    n_shown = len(spread(samples.records, n_records))
    headline = _headline(samples, n_shown, name, mode, len(rows[0].cells) - 1)
    letters = Lettering([headline, *(text for row in rows for text in row.texts())])
    done = Preview(headline, letters.missing)
    with mpl.rc_context(style(letters)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # told in `notes`
        figure = draw(headline, done.notes, rows, letters, watch)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix.lower())
        figure.savefig(out, metadata=undated)  # equal samples give equal files
    return done


def _headline(samples: SampleSet, n_records: int, name: str, mode: str, n_epochs: int) -> str:
    images = samples.mix.images_per_turn
    turns = f" in turns of up to {images} images" if images > 1 else ""
    changed = f" and in {_counted(n_epochs, 'epoch')} with augmentation {mode}"
    off = "; augmentation is off (custom.augmentation.mode)"
    total = _counted(len(samples.records), "training record")
    return f"{n_records} of {total} ({name}){turns}, as on disk{changed if n_epochs else off}"


def rows_of(samples: SampleSet, n_records: int, n_variants: int, watch: Watch = iter) -> list[Row]:
    """Rows with the turns of the first epoch that hold some records; one that is not in it, for its weight, is alone.

    Args:
        samples: of training.
        n_records: how many, evenly spread over the file.
        n_variants: epochs in which each is shown beside its form on disk, where there is an augmentation.
        watch: as for `save_preview`.

    Returns:
        A row a turn; several of the records may share one.
    """
    place = {record.id: n for n, record in enumerate(samples.records)}
    chosen = [place[record.id] for record in spread(samples.records, n_records)]
    turn_of = {each.record: turn for turn in reversed(samples.turns(0)) for each in turn}
    turns = dict.fromkeys(turn_of.get(n, (Showing(n),)) for n in chosen)
    epochs = range(n_variants if samples.mix.chain is not None else 0)
    return [_row(samples, turn, epochs) for turn in watch(list(turns))]


def _row(samples: SampleSet, turn: Turn, epochs: Sequence[int]) -> Row:
    """A turn as on disk and in some epochs. The same images in every cell, though in training turns are made anew."""
    plain = shown(turn, samples.records, samples.mix, epoch=0, changed=False)
    own = samples.shown(turn, 0)
    cells = [_cell(_ON_DISK, plain, plain, range(len(plain.objects)), samples.encoder)]
    for epoch in epochs:
        record = samples.shown(turn, epoch)
        origins = _origins(samples, turn, epoch) if record != plain else range(len(plain.objects))
        cells.append(_cell(f"epoch {epoch + 1}", record, plain, origins, samples.encoder))
    return Row(_title(samples, turn, plain), tuple(cells), _passages(samples.encoder.encode(own), samples.encoder))


def _title(samples: SampleSet, turn: Turn, plain: Record) -> str:
    """`train.jsonl:12, domain street`."""
    records = [samples.records[each.record] for each in turn]
    words = [record.id for record in records]
    words += [f"weight {record.weight:g}" for record in records if record.weight != 1]
    words += [f"domain {plain.domain}"] if plain.domain is not None else []
    words += ["summary"] if plain.task == "summary" else []
    return ", ".join(words)


def _origins(samples: SampleSet, turn: Turn, epoch: int) -> list[int]:
    """For each object of an augmented turn, its place among the objects of the turn on disk.

    A label does not say where it comes from. Its text has no part in what augmentation draws: numbers in the place of
    the texts come out with the objects that bear them.
    """
    chain, n_before = samples.mix.chain, 0
    assert chain is not None  # noqa: S101  # else nothing is augmented
    origins = []
    for showing in turn:
        record = replace(samples.records[showing.record], task=showing.task)  # a summary's objects all stay
        numbered = tuple(replace(each, desc=f"{n_before + n}/") for n, each in enumerate(record.objects))
        after = chain.change(replace(record, objects=numbered), epoch=epoch, copy=showing.copy)
        origins += [int(each.desc.partition("/")[0]) for each in after.objects]
        n_before += len(record.objects)
    return origins


def _cell(name: str, record: Record, plain: Record, origins: Sequence[int], encoder: Encoder) -> Cell:
    """One version of a turn; `origins` are the places of its objects among those of `plain`."""
    panels, captions, notes = [], [], []
    sizes = encoder.shown_sizes(record)
    for image, picture in enumerate(record.images):
        order = [place for place, _ in in_order(record, image, encoder.emit_norm, sizes[image])]
        labels = [
            Label(
                from_left_end(record.objects[place].geometry),  # as the answer writes it
                number if record.task == "dense" else None,
                record.objects[place].desc,
                origins[place],
            )
            for number, place in enumerate(order, 1)
        ]
        panels.append(Panel(picture, tuple(labels)))
        n_whole = sum(each.image == image for each in plain.objects)
        count = _counted(n_whole, "label")
        if name != _ON_DISK:
            count = f"{count}, as on disk" if picture.warp is None else f"{len(order)} of {count}"
        one = f"image {image + 1}, " if len(record.images) > 1 else ""
        captions.append(f"{one}{picture.size[0]}x{picture.size[1]}, {count}")
        if picture.warp is not None:
            lost = _losses(record, plain, origins, image, picture.warp).items()
            note = "; ".join(f"{what}: {_names(objects)}" for what, objects in lost if objects)
            notes += [one + note] if note else []
    captions[0] = f"{name}: {captions[0]}"
    return Cell(tuple(captions), tuple(notes), tuple(panels))


def _losses(record: Record, plain: Record, origins: Sequence[int], image: int, warp: Warp) -> dict[str, list[Object]]:
    """What augmentation has done to the labels of an image -> the objects on disk that it was done to."""
    lost: dict[str, list[Object]] = {"dropped": [], "cut": [], "cut and marked": [], "out of view": []}
    after = dict(zip(origins, record.objects, strict=True))
    for place, before in enumerate(plain.objects):
        if before.image != image:
            continue
        if place not in after:
            lost["dropped"].append(before)
            continue
        whole, left = moved(outline(before.geometry), warp.matrix), outline(after[place].geometry)
        x1, y1, x2, y2 = bounding_box(whole)
        shifts = [abs(a - b) for a, b in zip((x1, y1, x2, y2), bounding_box(left), strict=True)]
        if x2 <= 0 or y2 <= 0 or x1 >= warp.size[0] or y1 >= warp.size[1]:
            lost["out of view"].append(before)
        elif max(shifts) > _SHIFT or len(left) > len(whole):
            lost["cut" if after[place].desc == before.desc else "cut and marked"].append(before)
    return lost


def _names(objects: Sequence[Object]) -> str:
    if len(objects) > _NAMED:
        return _counted(len(objects), "label")
    return ", ".join(e.desc if len(e.desc) <= _NAME else e.desc[: _NAME - 1] + "…" for e in objects)


def _passages(sample: Sample, encoder: Encoder) -> tuple[Passage, ...]:
    """A sample's token ids as text, apart by whether they are learned; the tokens of an image are counted."""
    ids, image, learned = sample.input_ids.tolist(), sample.image_tokens.tolist(), sample.supervised.tolist()
    passages = []
    for is_learned, run in groupby(range(len(ids)), key=learned.__getitem__):
        places = list(run)
        text = ""
        for is_image, some in groupby(places, key=image.__getitem__):
            part = [ids[place] for place in some]
            plain = encoder.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            text += f"<image x {len(part)}>" if is_image else str(plain)
        what = "learned" if is_learned else "read, not learned"
        passages.append(Passage(f"{what}: {_counted(len(places), 'token')}", text, is_learned))
    return tuple(passages)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _no_out(out: Path, reason: str) -> UserError:
    allowed = "a file that can be written, in a folder that exists"
    return UserError("--out", f"{out}: {reason}", allowed, "choose another place")

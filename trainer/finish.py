"""After training: generates captions at the final and the best checkpoint and scores them."""

import time
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

import torch
from peft import PeftModel

from trainer import names
from trainer.checkpoint import load_adapter
from trainer.data.records import Record
from trainer.data.template import Encoder
from trainer.engine import Engine
from trainer.facts import captions_text
from trainer.generation import Caption, answer_lengths, caption
from trainer.reporter import Reporter
from trainer.scoring import Score
from trainer.tracker import Tracker

_SPARE_TOKENS = 16
"""Generation may be this much longer than the longest true answer before it is cut."""


def score_checkpoints(
    model: PeftModel,
    engine: Engine,
    encoder: Encoder,
    records: Sequence[Record],
    reporter: Reporter,
    tracker: Tracker,
    *,
    batch_size: int,
) -> None:
    """Caption `records` with the best checkpoint and with the last, log the scores and keep the captions.

    The best comes first where it lies before the last, so that rows come in the order of steps. Afterwards the model
    holds the weights of the last. Ranks share the records.
    """
    if not records:
        return
    done: set[int] = set()
    for kind in ("best", "last"):
        saved = reporter.checkpoints.get(kind)
        if saved is None or saved.seen.step in done:
            continue
        done.add(saved.seen.step)
        reporter.say(f"captioning {len(records)} validation records with the {kind} checkpoint")
        _load_on_all(model, engine, Path(saved.path))
        started = time.perf_counter()
        captions = caption_all(model, engine, encoder, records, batch_size=batch_size)
        row = {**_row(captions), names.GENERATION_SECONDS: time.perf_counter() - started}
        reporter.log(row, saved.seen.step)
        tracker.text(captions_text(captions), f"{kind}_{names.ARTIFACT_PREDICTIONS}")


@torch.no_grad()
def _load_on_all(model: PeftModel, engine: Engine, folder: Path) -> None:
    """Put a written adapter's tensors into the model of every rank; the first alone has the folder."""
    if engine.rank == 0:
        load_adapter(model, folder)
    for tensor in engine.trained:
        tensor.parameter.copy_(engine.from_first(tensor.parameter.detach()))


def caption_all(
    model: PeftModel, engine: Engine, encoder: Encoder, records: Sequence[Record], *, batch_size: int
) -> list[Caption]:
    """Captions of all records in their order; long ones are generated together, so that a batch ends together."""
    lengths = answer_lengths(encoder, records)
    by_length = sorted(range(len(records)), key=lambda index: -lengths[index])
    share = [records[index] for index in by_length[engine.rank :: engine.ranks]]
    limit = max(lengths) + _SPARE_TOKENS
    mine = caption(model, encoder, share, batch_size=batch_size, max_new_tokens=limit)
    by_id = {made.record_id: made for made in engine.gather(list(mine))}
    return [by_id[record.id] for record in records]


def _row(captions: Sequence[Caption]) -> dict[str, float]:
    score = reduce(add, (c.score for c in captions), Score())
    return {
        names.F1: score.f1,
        names.PRECISION: score.precision,
        names.RECALL: score.recall,
        names.F1_ATTRIBUTES: score.f1_attributes,
        names.CLASS_ACCURACY: score.class_accuracy,
    }

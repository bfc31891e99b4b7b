"""After training: generates captions at the final and the best checkpoint and scores them."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from peft import PeftModel

from trainer import names
from trainer.checkpoint import load_adapter
from trainer.data.records import Record
from trainer.data.template import Encoder
from trainer.facts import captions_text
from trainer.generation import Caption, caption, longest_answer
from trainer.reporter import Reporter
from trainer.scoring import Score
from trainer.tracking import Tracker

_SPARE_TOKENS = 16
"""Generation may be this much longer than the longest true answer before it is cut."""


def score_checkpoints(
    model: PeftModel,
    tokenizer: Any,
    encoder: Encoder,
    records: Sequence[Record],
    reporter: Reporter,
    tracker: Tracker,
    *,
    batch_size: int,
) -> None:
    """Caption `records` with the best checkpoint and with the last, log the scores and keep the captions.

    The best comes first where it lies before the last, so that rows come in the order of steps. Afterwards the model
    holds the weights of the last.
    """
    if not records:
        return
    limit = longest_answer(tokenizer, encoder, records) + _SPARE_TOKENS
    done: set[int] = set()
    for kind in ("best", "last"):
        saved = reporter.checkpoints.get(kind)
        if saved is None or saved.seen.step in done:
            continue
        done.add(saved.seen.step)
        reporter.say(f"captioning {len(records)} validation records with the {kind} checkpoint")
        load_adapter(model, Path(saved.path))
        captions = list(caption(model, tokenizer, encoder, records, batch_size=batch_size, max_new_tokens=limit))
        reporter.log(_row(captions), saved.seen.step)
        tracker.text(captions_text(captions), f"{kind}_{names.ARTIFACT_PREDICTIONS}")


def _row(captions: Sequence[Caption]) -> dict[str, float]:
    score = reduce(add, (c.score for c in captions), Score())
    return {
        names.F1: score.f1,
        names.PRECISION: score.precision,
        names.RECALL: score.recall,
        names.F1_ATTRIBUTES: score.f1_attributes,
        names.CLASS_ACCURACY: score.class_accuracy,
    }

"""One measured process of the baseline: transformers' Trainer, a PEFT model and a padding collator.

Started by throughput.py. Samples, plan and the start of the weights are ours, so that both train the same model on the
same tokens; the model is loaded as transformers loads it. One thing is set that is not the Trainer's default: it weighs
every supervised token of a step equally, as ours does, so that losses can be compared. It costs no time.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measured import CLIP, EVAL_BATCH, MICRO_BATCH, RATE, SAMPLES_A_STEP, SEED, Job, tell
from ours import plan_of
from probe import IGNORED, Probe
from stopwatch import LEFT_OUT, Watch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler, Subset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen3VLForConditionalGeneration, Trainer, TrainingArguments
from workload import Workload, ready

from trainer.data.template import Sample
from trainer.model import apply_plan


class Rows(Dataset[Sample]):
    """The workload's samples, encoded when they are asked for."""

    def __init__(self, workload: Workload) -> None:
        """All of them."""
        self.workload = workload

    def __len__(self) -> int:
        """How many."""
        return len(self.workload)

    def __getitem__(self, index: int) -> Sample:
        """One of them."""
        return self.workload[index]


class Collator:
    """Pads on the right; every token but the supervised ones gets the label that is ignored."""

    def __init__(self, pad_id: int) -> None:
        """`pad_id` is the token id of the padding."""
        self._pad_id = pad_id

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the model's forward takes, each (B, L), and the patches of all images."""
        labels = [s.input_ids.masked_fill(~s.supervised, IGNORED) for s in samples]
        return {
            "input_ids": pad_sequence([s.input_ids for s in samples], True, self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(s.input_ids) for s in samples], True),
            "labels": pad_sequence(labels, True, IGNORED),
            "mm_token_type_ids": pad_sequence([s.image_tokens.int() for s in samples], True),
            "pixel_values": torch.cat([s.pixel_values for s in samples]),
            "image_grid_thw": torch.cat([s.image_grid_thw for s in samples]),
        }


class InOrder(Trainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(job: Job, workload: Workload, folder: str, watch: Watch) -> InOrder:
    """A Trainer as its documentation would have it."""
    base = Qwen3VLForConditionalGeneration.from_pretrained(
        workload.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = InOrder(
        model=apply_plan(base, plan_of(job, str(workload.model)), seed=SEED),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=MICRO_BATCH,
            per_device_eval_batch_size=EVAL_BATCH,
            gradient_accumulation_steps=SAMPLES_A_STEP // MICRO_BATCH,
            max_steps=job.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            gradient_checkpointing=job.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            prediction_loss_only=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Rows(workload),
        data_collator=Collator(workload.pad_id),
    )
    trainer.model_accepts_loss_kwargs = True  # Qwen3-VL says no and takes them: else micro-batches weigh the same
    Probe(trainer, watch)
    return trainer


def evaluate_only(job: Job, trainer: InOrder, workload: Workload, watch: Watch) -> None:
    """The samples of the steps forward only, once to warm up and then counted."""
    rows = Rows(workload)
    supervised = [int(rows[i].supervised.sum()) for i in range(job.steps * SAMPLES_A_STEP)]
    for steps in (LEFT_OUT, job.steps):
        n = steps * SAMPLES_A_STEP
        metrics = trainer.evaluate(Subset(rows, range(n)))
        watch.step(n, sum(supervised[:n]))
    watch.losses.append(metrics["eval_loss"])


def _forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(dout: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(dout, q, k, v)


def count(trainer: InOrder, workload: Workload, steps: range) -> tuple[float, float]:
    """GFLOP of a sample, forward alone and with backward, over the batches of some steps, padding and all.

    Operations of gradient checkpointing are not counted: they are no use to anybody.
    """
    attention = torch.ops.aten  # torch counts attention on a GPU only
    known = {
        attention._scaled_dot_product_flash_attention_for_cpu: _forward,
        attention._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    collate, totals, n = Collator(workload.pad_id), [0, 0], 0
    trainer.model.train()
    for first in range(steps.start * SAMPLES_A_STEP, steps.stop * SAMPLES_A_STEP, MICRO_BATCH):
        batch = collate([workload[first + i] for i in range(MICRO_BATCH)])
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            loss = trainer.model(**batch).loss
            totals[0] += counter.get_total_flops()
            loss.backward()
            totals[1] += counter.get_total_flops()
        n += MICRO_BATCH
    return totals[0] / n / 1e9, totals[1] / n / 1e9


def main() -> None:
    """Measure the job on the command line, and tell."""
    job = Job.read(sys.argv[1])
    workload = ready(Path(job.workload))
    watch = Watch(LEFT_OUT if job.work == "train" else 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, workload, folder, watch)
        if job.work == "train":
            trainer.train()
        elif job.work == "eval":
            evaluate_only(job, trainer, workload, watch)
        else:
            tell({"gflop": count(trainer, workload, range(LEFT_OUT, job.steps))})
            return
        tell(asdict(watch.result()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

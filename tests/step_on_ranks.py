"""One optimizer step of the tiny model on this rank of several; run by test_ranks under torch's launcher.

python -m torch.distributed.run --nproc-per-node 2 -m tests.step_on_ranks FOLDER plain|zero float32|bfloat16 DROPOUT

With `fused` behind it, in the fused pass.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import PAD_ID, shapes_of, strategy, tiny_model, tiny_samples
from trainer import launch
from trainer.config.zero import zero_settings
from trainer.data.loader import Batch, collate
from trainer.data.packing import Fixed, StepPlan
from trainer.engine import Engine
from trainer.events import Seen
from trainer.fused.forward import FusedLoss
from trainer.gate import Gate
from trainer.loop import Parts, train_step
from trainer.model import SupervisedLoss, apply_plan, trained_tensors
from trainer.optim import Schedule, make_optimizer
from trainer.strategy import make_plan

LENGTHS = (7, 12, 20, 9, 15)
RATE = 1e-5
CLIP = 0.5


def take(
    folder: Path, kind: str, dtype: str, dropout: float, *, fused: bool = False, ranks: int = 1, accumulation: int = 2
) -> None:
    """Train one step on five samples in packs of two or so; the first rank writes what came out.

    `step.json`: loss, norms, counts. `step.safetensors`: every gradient before clipping, every update.
    """
    plan = StepPlan(Fixed(tuple(length + 2 for length in LENGTHS)), seed=3, micro_batch=1, accumulation=accumulation,
                    ranks=ranks, capacity=36)  # fmt: skip
    base = tiny_model(dtype=getattr(torch, dtype))
    model = apply_plan(base, make_plan(strategy("all_lora", dropout=dropout), shapes_of(base)), seed=1)
    trained = list(trained_tensors(model))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    gate = Gate(trained, frozen, last_look=2)
    before = {t.name: t.parameter.detach().clone() for t in trained}
    n_trained = sum(t.parameter.numel() for t in trained)
    accelerator = launch.join(ranks, (lambda: _zero(n_trained)) if kind == "zero" else None)
    loss = (FusedLoss if fused else SupervisedLoss)(model, bf16=dtype == "bfloat16")
    make: Any = Engine
    if kind == "zero":
        from trainer.zero2 import ZeroEngine as make
    engine: Engine = make(accelerator, loss, make_optimizer(trained, weight_decay=0.0), trained, max_grad_norm=CLIP)
    caught: dict[str, torch.Tensor] = {}
    look = gate.before_update

    def watched(step: int, gradient_of: Any) -> None:
        caught.update({t.name: gradient_of(t).detach().clone() for t in trained})
        look(step, gradient_of)

    gate.before_update = watched  # type: ignore[method-assign]
    schedule = Schedule(dict.fromkeys(("vision", "aligner", "llm"), RATE), RATE, 0, 10)
    samples = tiny_samples(LENGTHS, grids=[(2, 4)])
    batches = [_batch(samples, micro[engine.rank]) for micro in next(plan.steps())]
    done = train_step(Parts(engine, schedule, gate, 17), batches, Seen(), n_samples=len(samples))
    updates = {t.name: engine.weight(t).cpu() - before[t.name] for t in trained}
    silent = engine.gather([batch.n_samples == 0 for batch in batches])
    if engine.rank == 0:
        tensors = {f"gradient/{name}": g.contiguous() for name, g in caught.items()}
        save_file(
            tensors | {f"update/{name}": u.contiguous() for name, u in updates.items()}, folder / "step.safetensors"
        )
        facts = {"loss": done.loss, "norms": dict(done.grad_norms), "samples": done.seen.samples,
                 "tokens": done.seen.tokens, "silent": silent}  # fmt: skip
        (folder / "step.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()


def _batch(samples: list[Any], indices: list[int]) -> Batch:
    batch = collate([samples[i] for i in indices or [0]], PAD_ID, packed=True)
    return batch if indices else batch.silent()


def _zero(n_trained: int) -> Any:
    from trainer.zero2 import deepspeed_accelerator

    settings, _ = zero_settings("zero2", "test")
    return deepspeed_accelerator(settings, micro_batch=1, max_grad_norm=CLIP, n_trained=n_trained)


if __name__ == "__main__":
    import os

    count = int(os.environ["WORLD_SIZE"])
    take(
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        float(sys.argv[4]),
        fused="fused" in sys.argv,
        ranks=count,
        accumulation=4 // count,
    )
    launch.end(0)

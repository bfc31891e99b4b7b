"""ZeRO-2: gradients and optimizer state split over ranks, by DeepSpeed through accelerate (arXiv:1910.02054).

Batch, accumulation, clipping, precision, optimizer and schedule are this project's own also under DeepSpeed, so that a
run with it is the same run. Trained tensors stay float32 and are their own masters: DeepSpeed's bf16 mode would cast
them, and the frozen base needs no casting.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from trainer.data.loader import Batch
from trainer.engine import MOMENTS, Engine
from trainer.model import TrainedTensor

_LARGEST_BUCKET = 200_000_000
"""Elements exchanged at once; DeepSpeed holds a buffer of that size."""


def deepspeed_accelerator(
    settings: Mapping[str, Any], *, micro_batch: int, max_grad_norm: float, n_trained: int
) -> Accelerator:
    """An accelerator that prepares models for DeepSpeed.

    Args:
        settings: DeepSpeed's own, as `zero_settings` returns them.
        micro_batch: packs that one rank runs forward at once; DeepSpeed only wants to know.
        max_grad_norm: norm to which the whole gradient is clipped.
        n_trained: parameters that train.
    """
    bucket = min(_LARGEST_BUCKET, n_trained)
    zero = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, **settings["zero_optimization"]}
    ours = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 1,  # the engine is told where a step ends, see `accumulate`
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    # without an accelerator chip accelerate asks for no process group at all unless a backend is named
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with redirect_stdout(sys.stderr):  # on a CPU it compiles a part of itself the first time, and prints that
        return Accelerator(
            mixed_precision="no",  # SupervisedLoss computes in bf16 itself
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={**settings, **ours}),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
        )


class ZeroEngine(Engine):
    """Ranks that split gradients and optimizer state."""

    def accumulate(self, batch: Batch, n_supervised: int, *, last: bool) -> Tensor:
        """Run a micro-batch forward and backward; see `Engine.accumulate`.

        DeepSpeed's `backward` and `step` are called apart: accelerate's `backward` would update by itself, before
        anybody has looked at the gradients.
        """
        self._model.set_gradient_accumulation_boundary(is_boundary=last)
        nll = self._losses(self._model, batch)
        self._model.backward(nll.sum() * (self.ranks / n_supervised), scale_wrt_gas=False)
        return nll.detach()

    def gradient(self, tensor: TrainedTensor) -> Tensor | None:
        """A tensor's gradient over the whole step, gathered from all ranks."""
        gradient: Tensor | None = safe_get_full_grad(tensor.parameter)
        return gradient

    def weight(self, tensor: TrainedTensor) -> Tensor:
        """The float32 master of a tensor, gathered from all ranks."""
        master: Tensor = safe_get_full_fp32_param(tensor.parameter)
        return master.detach()

    def let_go(self) -> dict[str, dict[str, Tensor]]:
        """Give up DeepSpeed's engine; see `Engine.let_go`."""
        old: Any = self._model
        moments = super().let_go()
        # It destroys itself once more when it is collected, whenever that is, and would take the parameters from
        # whichever engine has them by then: their gradients would be zero from there on.
        old.destroy = lambda: None
        return moments

    def moments(self, tensor: TrainedTensor) -> dict[str, Tensor]:
        """What the optimizer remembers of a tensor, gathered from all ranks."""
        mapping = cast(Any, tensor.parameter)._hp_mapping
        if mapping is not None and not mapping.optim_fragment:
            self._find_pieces()
        return {name: safe_get_full_optimizer_state(tensor.parameter, name).detach() for name in MOMENTS}

    def load_moments(self, updates: int, moment: Callable[[TrainedTensor, str], Tensor]) -> None:
        """Give every rank its pieces back; see `Engine.load_moments`.

        DeepSpeed's own checkpoint is not used: reading it can run code, and it fits one number of ranks.
        """
        zero: Any = self._model.optimizer
        for group, flat in zip(zero.optimizer.param_groups, zero.single_partition_of_fp32_groups, strict=True):
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(updates - group["start"]), device=flat.device),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        self._find_pieces()
        for tensor in (tensor for tensor in self.trained if tensor.start < updates):
            for name in MOMENTS:
                safe_set_full_optimizer_state(tensor.parameter, moment(tensor, name).to(self.device), name)

    def _find_pieces(self) -> None:
        """Tell every parameter where in the optimizer's state its piece lies.

        DeepSpeed does it after its first update, but then of the first parameter group alone: it looks when the others
        have no state yet.
        """
        zero: Any = self._model.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _own_gradient(self, tensor: TrainedTensor) -> Tensor | None:
        """The piece of a tensor's gradient that this rank keeps; None where all of it lies on other ranks."""
        parameter: Any = tensor.parameter
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _over_pieces(self, *squares: float) -> list[float]:
        """Sums of something over the pieces of all ranks."""
        return self.sum(*squares)

    def update(self, norm: float) -> None:
        """Clip by the norm that DeepSpeed finds itself, update the weights, and share them among the ranks."""
        self._model.step()

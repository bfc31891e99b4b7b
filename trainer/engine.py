"""What one process, several ranks and ZeRO-2 do differently: backward, exchange of gradients, clipping, the update.

The loss is a sum over the supervised tokens of the *whole* step, so gradients of ranks are added, not averaged: both
DistributedDataParallel and DeepSpeed divide by the number of ranks, and the loss is multiplied by it beforehand.
"""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from trainer.data.loader import Batch
from trainer.model import TrainedTensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every tensor: running means of its gradient and of the gradient's square."""


class Engine:
    """One process, or ranks that exchange gradients through DistributedDataParallel."""

    def __init__(
        self,
        accelerator: Accelerator,
        loss: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: Sequence[TrainedTensor],
        *,
        max_grad_norm: float,
    ) -> None:
        """Prepare a model for training.

        Args:
            accelerator: of this rank.
            loss: the model as a function from inputs to the loss of every supervised token.
            optimizer: over all of `trained`.
            trained: the tensors that train, in the model's order.
            max_grad_norm: norm to which the whole gradient is clipped.
        """
        self.max_grad_norm = max_grad_norm
        self._accelerator = accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.device: torch.device = accelerator.device
        self._model: Any
        self.take_over(loss, optimizer, trained)

    def take_over(
        self, loss: torch.nn.Module, optimizer: torch.optim.Optimizer, trained: Sequence[TrainedTensor]
    ) -> None:
        """Train these from here on; what trained before was let go."""
        self.loss, self.trained = loss, trained
        self.optimizer: torch.optim.Optimizer
        self._model, self.optimizer = self._accelerator.prepare(loss, optimizer)

    def let_go(self) -> dict[str, dict[str, Tensor]]:
        """Give up model and optimizer. Returns the `moments` of every tensor by its name, on all ranks.

        All that hangs on the parameters goes with them: the hooks of an exchange of gradients, of ZeRO-2's pieces.
        """
        moments = {tensor.name: self.moments(tensor) for tensor in self.trained}
        del self.loss, self._model, self.optimizer
        self._accelerator.free_memory()
        if self.ranks > 1:
            gc.collect()  # only now does nobody hold DistributedDataParallel, whose hooks go with it
        return moments

    def accumulate(self, batch: Batch, n_supervised: int, *, last: bool) -> Tensor:
        """Run a micro-batch forward and backward; gradients add up until `update`.

        Args:
            batch: of this rank.
            n_supervised: supervised tokens of the whole step, all micro-batches and ranks.
            last: whether it is the step's last micro-batch, after which gradients are complete on all ranks.

        Returns:
            (supervised tokens of the batch,) nats, row by row.
        """
        with nullcontext() if last else self._accelerator.no_sync(self._model):
            nll = self._losses(self._model, batch)
            (nll.sum() * (self.ranks / n_supervised)).backward()
        return nll.detach()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Losses of a batch in eval mode, of this rank alone: (supervised tokens of the batch,) nats, row by row."""
        return self._losses(self.loss, batch)

    def _losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        moved = batch.to(self.device)
        losses: Tensor = model(supervised=moved.supervised, **moved.model_inputs())
        return losses

    def gradient(self, tensor: TrainedTensor) -> Tensor | None:
        """A tensor's gradient over the whole step, complete and not yet clipped; all ranks ask for it together."""
        return tensor.parameter.grad

    def weight(self, tensor: TrainedTensor) -> Tensor:
        """The float32 values that the optimizer updates; all ranks ask for them together."""
        return tensor.parameter.detach()

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of the whole step's gradient over each part, and `total`."""
        squares = dict.fromkeys(sorted({tensor.part.value for tensor in self.trained}), 0.0)
        for tensor in self.trained:
            if (piece := self._own_gradient(tensor)) is not None:
                # a float32 sum over a matrix of the 4B's size is off by 5e-4 on a CPU, one of float64 is not
                squares[tensor.part.value] += torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2
        sums = self._over_pieces(*squares.values())
        norms = {part: math.sqrt(square) for part, square in zip(squares, sums, strict=True)}
        return {**norms, "total": math.hypot(*norms.values())}

    def _own_gradient(self, tensor: TrainedTensor) -> Tensor | None:
        """The piece of a tensor's gradient that this rank keeps after the exchange."""
        return tensor.parameter.grad

    def _over_pieces(self, *squares: float) -> list[float]:
        """Sums of something over all pieces of the gradient; here every rank has the whole."""
        return list(squares)

    def update(self, norm: float) -> None:
        """Clip the gradient, whose norm is `norm`, and update the weights."""
        scale = self.max_grad_norm / (norm + 1e-6)  # the same guard as torch.nn.utils.clip_grad_norm_
        if scale < 1:
            torch._foreach_mul_([t.parameter.grad for t in self.trained if t.parameter.grad is not None], scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self, tensor: TrainedTensor) -> dict[str, Tensor]:
        """What the optimizer remembers of a tensor, by name, each of the tensor's shape; all ranks ask together."""
        state = self.optimizer.state[tensor.parameter]
        return {name: state[name] for name in MOMENTS}

    def load_moments(self, updates: int, moment: Callable[[TrainedTensor, str], Tensor]) -> None:
        """Give the optimizer its memory back; all ranks together.

        Args:
            updates: how many it has made; it remembers nothing of tensors that have had none.
            moment: the whole of what it remembers of a tensor under a name (see `MOMENTS`).
        """
        for tensor in (tensor for tensor in self.trained if tensor.start < updates):
            parameter = tensor.parameter
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates - tensor.start), device=parameter.device),
                **{name: moment(tensor, name).to(parameter.device) for name in MOMENTS},
            }

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.ranks == 1:
            return list(values)
        total: Tensor = self._accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        sums: list[float] = total.tolist()
        return sums

    def from_first(self, value: Tensor) -> Tensor:
        """The first rank's values of a tensor that every rank has in the same shape."""
        if self.ranks > 1:
            value = broadcast(value.to(self.device), from_process=0)
        return value

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, end to end."""
        gathered: list[Any] = gather_object(items) if self.ranks > 1 else items
        return gathered

"""Matrix products: which library makes them, and linear maps with what PEFT has put around them."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.fused.on_gpu import compiled_on_gpu

# Shapes: T rows, K inputs, N outputs, R ranks of all adapters of a projection together.


@cache
def prefers_onednn() -> bool:
    """Whether float32 products go to oneDNN: MKL, which torch calls, uses AVX-512 on Intel's processors alone.

    On a Zen 5 the difference is a factor of two (docs/performance.md). The processor decides, not a measurement: the
    same machine must add in the same order in every run.
    """
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch annotates neither
    if not built or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "Intel" not in platform.processor()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows times a weight, x @ weight.T + bias.

    Args:
        x: (T, K).
        weight: (N, K), in any strides: that of the gradient is given as `weight.T`.
        bias: (N,).

    Returns:
        (T, N).
    """
    if x.dtype is torch.float32 and not x.is_cuda and prefers_onednn():
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return linear(x, weight, bias)


def rounding(x: Tensor) -> int:
    """Rows of nothing that are worth adding: on a CPU oneDNN compiles a product for each number of rows that it meets.

    That takes about a millisecond and a megabyte each; rounded up to 64 there are few.
    """
    return 0 if x.is_cuda else -len(x) % 64


@compiled_on_gpu
def dropped(x: Tensor, mask: Tensor, kept: float) -> Tensor:
    """Dropout: `x` where the mask is true, divided by the share that is kept; both (T, K)."""
    return x.mul(mask).mul_(1 / kept)


def live(module: Any) -> Any:
    """What computes: of a module that PEFT keeps a trained copy of, the copy, unless that is switched off."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]


@dataclass(frozen=True)
class Adapter:
    """One LoRA: y[columns] += scale * B A dropout(x)."""

    a: nn.Parameter
    """(rank, K)."""
    b: nn.Parameter
    """(N of its module, rank)."""
    scale: float
    dropout: float
    columns: slice
    """Its module's among the projection's outputs."""
    ranks: slice
    """Its own among the projection's R."""


class Projection:
    """Linear maps that read the same input, as one: frozen weights lie end to end, and one product makes all outputs.

    The dropout of its adapters is one mask: they read the same input.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take over linear modules, PEFT-wrapped or not.

        Frozen weights of several are moved into one tensor, of which the modules' own become views: no byte more.
        """
        self._bases: list[Any] = []
        self.adapters: list[Adapter] = []
        column, rank = 0, 0
        for module in map(live, modules):
            base: Any = module
            if isinstance(module, LoraLayer):
                base = module.base_layer
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                (name,) = module.active_adapters
                a: Any = module.lora_A[name].weight
                b: Any = module.lora_B[name].weight
                p = getattr(module.lora_dropout[name], "p", 0.0)
                columns, ranks = slice(column, column + len(b)), slice(rank, rank + len(a))
                self.adapters.append(Adapter(a, b, module.scaling[name], p, columns, ranks))
                rank += len(a)
            self._bases.append(base)
            column += base.out_features
        self.dropout = max((adapter.dropout for adapter in self.adapters), default=0.0)
        full = [p for base in self._bases for p in (base.weight, base.bias) if p is not None and p.requires_grad]
        self._full = bool(full)
        self._frozen = {} if full else {name: self._merged(name) for name in ("weight", "bias")}
        self.trained: list[nn.Parameter] = [*full, *(p for of in self.adapters for p in (of.a, of.b))]
        """What of it trains, in the order in which `backward` returns gradients."""

    def mask(self, rows: int, device: torch.device) -> Tensor | None:
        """A new dropout mask for the adapters' input, (rows, K) bool; None where nothing is dropped."""
        if not self.dropout:
            return None
        shape = rows, self._bases[0].in_features
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - self.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(T, K) -> (T, N), and what `backward` wants to have back: (T, R), None without adapters."""
        y = product(x, self._of("weight", x.dtype), self._of("bias", x.dtype))
        low = self.low(x, mask)
        if low is None:
            return y, None
        for adapter in self.adapters:
            y[:, adapter.columns].addmm_(low[:, adapter.ranks], adapter.b.to(x.dtype).T, alpha=adapter.scale)
        return y, low

    def low(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """(T, K) -> (T, R), A dropout(x) of all adapters; None without any."""
        return product(self._dropped(x, mask), self._down(x.dtype)) if self.adapters else None

    def backward(self, dy: Tensor, x: Tensor, mask: Tensor | None, low: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the input, (T, K), and of `trained`."""
        dx = product(dy, self._of("weight", dy.dtype).T)
        grads: list[Tensor] = []
        if self._full:
            column = 0
            for base in self._bases:
                own = dy[:, column : column + base.out_features]
                if base.weight.requires_grad:
                    grads.append(product(own.T, x.T))
                if base.bias is not None and base.bias.requires_grad:
                    grads.append(own.sum(0))
                column += base.out_features
        if low is not None:
            dlow = torch.empty_like(low)
            pieces = [(adapter, dy[:, adapter.columns], low[:, adapter.ranks]) for adapter in self.adapters]
            for adapter, own, _ in pieces:
                torch.mul(own @ adapter.b.to(dy.dtype), adapter.scale, out=dlow[:, adapter.ranks])
            da = dlow.T @ self._dropped(x, mask)
            for adapter, own, of_low in pieces:
                grads += [da[adapter.ranks], (own.T @ of_low).mul_(adapter.scale)]
            dx += self._dropped(product(dlow, self._down(dy.dtype).T), mask)
        return dx, [grad.to(p.dtype) for grad, p in zip(grads, self.trained, strict=True)]

    def _dropped(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else dropped(x, mask, 1 - self.dropout)

    def _down(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([adapter.a for adapter in self.adapters]).to(dtype)

    def _merged(self, name: str) -> Tensor | None:
        tensors = [getattr(base, name) for base in self._bases]
        if tensors[0] is None or len(tensors) == 1:
            return tensors[0]  # type: ignore[no-any-return]  # a tensor or None, by its name
        whole = torch.cat([tensor.data for tensor in tensors])
        start = 0
        for tensor in tensors:
            tensor.data = whole[start : start + len(tensor)]
            start += len(tensor)
        return whole

    def _of(self, name: str, dtype: torch.dtype) -> Any:
        """Weight or bias of all modules, in the format of the rows; None where they have none."""
        if self._full and getattr(self._bases[0], name) is not None:
            return torch.cat([getattr(base, name) for base in self._bases]).to(dtype)
        frozen = self._frozen.get(name)
        return frozen if frozen is None else frozen.to(dtype)

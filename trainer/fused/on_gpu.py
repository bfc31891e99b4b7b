"""Fuses a small operation into few kernels where its tensors are on a GPU: by torch.compile, at its first call."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_gpu(operation: Callable[P, R]) -> Callable[P, R]:
    """The same operation, compiled for tensors on a GPU; on a CPU it is left as it is.

    Its gradient is written by hand, so autograd never looks into it. The number of rows is left open, so that packs of
    other lengths do not compile it again; their width is fixed, so that a row is read once.
    """

    @cache
    def compiled() -> Any:
        return torch.compile(operation, dynamic=False)

    @wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiles(args[0]):
            return operation(*args, **kwargs)
        rows = len(args[0])  # type: ignore[arg-type]  # a tensor (T, ...), which P cannot say; see functions.py
        with torch.no_grad():
            made: R = compiled()(*(_open(value, rows) for value in args), **kwargs)
        return made

    return call


def compiles(first: Any) -> bool:
    """Whether an operation that is given this tensor is compiled; inside of another that is, it is part of it."""
    return bool(first.is_cuda) and not torch.compiler.is_compiling()


def _open(value: Any, rows: int) -> Any:
    """The value, no part of autograd's graph, and its rows marked as a number that changes."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.ndim > 1 and len(value) == rows:
        torch._dynamo.maybe_mark_dynamic(value, 0)
    return value

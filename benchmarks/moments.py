"""Writes down when a process of a training passes certain places, from inside it; the trainer knows nothing of it.

`startup.py` has every Python process of a training import this before anything else. A line goes to the file that the
environment variable MOMENTS names: rank, seconds since 1970, and what has just been passed for the first time.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PLACES = {
    ("trainer.options", "resolve"): "arguments read",
    ("trainer.build", "load_base"): "model loaded",
    ("trainer.loop", "evaluate_all"): "first evaluation",
    ("trainer.loop", "train_step"): "first step",
}
"""(Module, its function) -> what is passed when that returns."""
ENTERED = {("trainer.loop", "fit"): "loop entered"}
"""The same for functions that are passed when they are called."""
_MODULES = {module for module, _ in (*PLACES, *ENTERED)}
_passed: set[str] = set()


def note(moment: str) -> None:
    """Write a moment down, the first time it is passed."""
    if moment in _passed:
        return
    _passed.add(moment)
    with open(os.environ["MOMENTS"], "a", encoding="utf-8") as file:
        file.write(f"{os.environ.get('RANK', '-')} {time.time()} {moment}\n")


def noting(function: Callable[..., Any], *, before: str | None, after: str | None) -> Callable[..., Any]:
    """A function that also notes moments."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if before:
            note(before)
        returned = function(*args, **kwargs)
        if after:
            note(after)
        return returned

    return called


class _Noting(Loader):
    """Loads a module and puts noting functions in the place of some of its own."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in {name for where, name in (*PLACES, *ENTERED) if where == module.__name__}:
            at = (module.__name__, name)
            setattr(module, name, noting(getattr(module, name), before=ENTERED.get(at), after=PLACES.get(at)))


class _Finder(MetaPathFinder):
    """Finds the modules whose functions are watched."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in _MODULES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Noting(spec.loader)
        return spec


if "MOMENTS" in os.environ:
    sys.meta_path.insert(0, _Finder())

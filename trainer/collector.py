"""Python's collector of cycles, kept still while libraries are imported.

An import makes hundreds of thousands of objects that live as long as the process. The collector goes through all of
them again and again as they come, for a third of the time that the imports take, and finds next to nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """While this lasts nothing is collected; what is there at its end is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

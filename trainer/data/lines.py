"""The lines of a JSONL file, one at a time and within bounds, whatever the file is."""

import gc
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import DataError

_MAX_LINE = 16 * 2**20  # bytes; what JSON makes of them takes up to 25 times as much memory
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def lines_of(jsonl: Path) -> Iterator[bytes]:
    """The lines of a file, blank ones too, without its byte order mark.

    Raises:
        DataError: it cannot be read, or holds something else than lines.
    """
    try:
        if not stat.S_ISREG(jsonl.stat().st_mode):
            raise no_file(jsonl, "not a regular file")  # opening a pipe would wait for a writer for ever
        with jsonl.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise no_file(jsonl, f"line {number} is longer than {_MAX_LINE:,} bytes")
                yield line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    except OSError as error:
        raise no_file(jsonl, error.strerror or str(error)) from error


def no_file(jsonl: Path, got: str) -> DataError:
    """The error of a file that is not what it should be.

    Args:
        jsonl: the file.
        got: what it is.
    """
    return DataError(
        where=str(jsonl),
        got=got,
        allowed="a JSONL file, one record a line",
        do="correct the path (`custom.train_jsonl`, `custom.val_jsonl`) or the file; `convert` reads other formats",
    )


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from going again and again over what is read: a million records take half the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()

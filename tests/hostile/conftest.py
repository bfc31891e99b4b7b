"""Bounds that hold over every test here, and the count of what was tried."""

from collections.abc import Iterator

import pytest

from tests.hostile.harness import EXAMPLES, MEGABYTES, forget_peak, peak_megabytes, tally


@pytest.fixture(autouse=True)
def _memory_is_bounded() -> Iterator[None]:
    """No test may take more memory than one input may."""
    forget_peak()
    before = peak_megabytes()
    yield
    assert peak_megabytes() - before < MEGABYTES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A long search ends with how many inputs ended how."""
    for (search, ending), count in sorted(tally.items()) if EXAMPLES else ():
        terminalreporter.write_line(f"{search}: {count} ended in {ending}")

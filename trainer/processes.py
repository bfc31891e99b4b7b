"""Starts the ranks of a run on this host, one way or the other, and closes the run where they died without a word."""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import launch
from trainer.config.schema import Launch


def to_their_end(asked: Launch, arguments: Sequence[str], runs: Path) -> int:
    """Run `python -m trainer ARGUMENTS` on the ranks that a configuration asks for; the exit status.

    Args:
        asked: how many, and on which hosts.
        arguments: of the command.
        runs: folder of all runs.

    Raises:
        ConfigError: they cannot be started as asked.
        KeyboardInterrupt: the ranks were ended by it.
    """
    first = True
    try:
        if asked.hosts or asked.restarts:
            from trainer.hosts import elastic  # torch, which a launcher of ranks on one machine does without

            hosts = elastic.hosts_of(asked)
            first = hosts.rank == 0
            ended = elastic.start(asked, hosts, arguments)
            status = ended.status
            if ended.reason:
                again = "; the same command, on all hosts, goes on" if status == elastic.INTERRUPTED else ""
                print(f"ended with status {status}: {ended.reason}{again}", file=sys.stderr)
        else:
            status = launch.start(asked.ranks, arguments)
    except KeyboardInterrupt:  # some ranks may have had to be killed
        if first:
            _close_dead(runs)
        raise
    if status and first:
        _close_dead(runs)
    return status


def _close_dead(runs: Path) -> None:
    from trainer.sync import close_dead  # MLflow

    for line in close_dead(runs):
        print(line, file=sys.stderr)

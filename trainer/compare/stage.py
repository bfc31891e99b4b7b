"""One stage of a comparison: which of its runs are still missing, all of them, and what has failed."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console

from trainer import names
from trainer.compare.arms import Entered, arguments
from trainer.compare.asked import Asked
from trainer.compare.children import Job, Standing, last_words, standing
from trainer.compare.jobs import Board, Ended, run_all
from trainer.compare.parent import Parent

Jobs = Mapping[tuple[str, int], Job]
"""(arm, seed) -> its run."""
RATES_TRIED = "rates_tried"
"""What a comparison knows of the rates that it has tried out: arm -> rate -> loss."""
HALVING_LINES = "halving_lines"
"""What it knows of the decisions of halving: lines of Markdown, for its description."""


class Failed(RuntimeError):
    """Some runs of a comparison have failed; it stays open, and the same command tries them again."""


def job_of(entered: Entered, seed: int, asked: Asked, of: Parent) -> Job:
    """The run of an arm and a seed."""
    arm = entered.arm.name
    tried = (of.known(RATES_TRIED) or {}).get(arm)
    tags = {names.TAG_ROLE: names.ARM, names.TAG_ARM: arm}
    tags |= {names.TAG_RATES_TRIED: json.dumps(tried)} if tried else {}
    name = f"{arm}-seed{seed}"
    return Job(name, arguments(entered, seed, asked.profile, asked.common), of.path / "arms" / name, of.run_id, tags)


def is_over(now: Standing) -> bool:
    """Whether a run has come to its end."""
    return now.state == "over"


def run_stage(jobs: Sequence[Job], asked: Asked, of: Parent, console: Console, *, what: str, total: int) -> list[Ended]:
    """Run jobs, all that there is room for at once; those that have failed.

    Args:
        jobs: that are to do, in the order in which they are started.
        asked: the comparison.
        of: its parent.
        console: for people.
        what: they are, for the display.
        total: jobs of this stage, with those that were done before.
    """
    room = asked.room(len(jobs), of.known("threads"))
    of.note(threads=room.threads)
    if not jobs:
        return []
    console.print(f"{len(jobs)} of {total} {what} to do, {room.why}; logs in {of.path}", markup=False)
    try:
        with Board(total, done=total - len(jobs), what=what, console=console) as board:
            return [one for one in run_all(jobs, room, board) if one.status]
    except (KeyboardInterrupt, SystemExit):
        console.print("the runs are ended, resumably: the same command goes on with the comparison", markup=False)
        raise


def missing(jobs: Sequence[Job]) -> list[Job]:
    """Those that have not come to their end."""
    return [job for job in jobs if not is_over(standing(job.folder))]


def told(failed: Sequence[Ended], total: int) -> str:
    """What has failed: status, the end of the log, and where that lies."""
    lines = [f"{len(failed)} of {total} runs failed; the same command tries them again"]
    for one in failed:
        lines.append(f"{one.job.name}: status {one.status}, {one.job.log}")
        lines += [f"    {line}" for line in last_words(one.job.log)]
    return "\n".join(lines)

"""The course of a comparison: learning rates first where that is wanted, all arms on all seeds, and the conclusion."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from trainer import names
from trainer.addresses import Store
from trainer.compare import conclusion, parent, tuning
from trainer.compare.asked import Asked
from trainer.compare.children import Job, standing
from trainer.compare.description import kind_of, of_comparison
from trainer.compare.jobs import Ended
from trainer.compare.parent import Parent
from trainer.compare.stage import Failed, is_over, job_of, missing, run_stage, told

Jobs = Mapping[tuple[str, int], Job]
"""(arm, seed) -> its run."""


def compare(asked: Asked, store: Store) -> Path:
    """Run a comparison to its end, or go on with it; the folder that holds it.

    Raises:
        Failed: some runs did not come to their ends.
        UserError: it cannot begin.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if over := parent.finished(asked.output_dir, asked.identity(), store):
        console.print(f"this comparison is finished, its folder is {over[0]}", markup=False)
        parent.join(over[1], store)
        conclusion.rank(over[1])
        return over[0]
    with parent.opened(
        asked.output_dir, asked.identity(), store, title=f"comparison of {', '.join(asked.names)}"
    ) as of:
        of.tracker.description(of_comparison(asked, of))
        if asked.tune:
            asked = tuning.tuned(asked, of, console)
        jobs = {
            (entered.arm.name, seed): job_of(entered, seed, asked, of) for seed in asked.seeds for entered in asked.arms
        }
        failed = run_stage(missing([*jobs.values()]), asked, of, console, what="runs", total=len(jobs))
        conclude(jobs, asked, of, console, failed)
        return of.path


def conclude(jobs: Jobs, asked: Asked, of: Parent, console: Console, failed: Sequence[Ended]) -> None:
    """Rank what has come to its end; where nothing has failed, write the report too.

    Raises:
        Failed: some runs have, or the report could not be written.
    """
    notices = unequal_batches(jobs, asked)
    left = conclusion.deliver([path for job in jobs.values() if (path := standing(job.folder).path)])
    for line in (*left, *notices):
        console.print(line, markup=False)
    of.tracker.description(of_comparison(asked, of, jobs, notices))
    ranked = any(is_over(standing(job.folder)) for job in jobs.values()) and conclusion.rank(of.run_id)
    if failed:
        raise Failed(told(failed, len(jobs)))
    if not ranked or not conclusion.write(of):
        raise Failed(f"all runs are done, and the report on them could not be written: see {of.path / conclusion.LOG}")
    console.print(kind_of(asked).replace("**", ""), markup=False)
    console.print(f"report: {of.path / conclusion.REPORT}, and artifacts of run {of.run_id}", markup=False)


def unequal_batches(jobs: Jobs, asked: Asked) -> list[str]:
    """A line for each seed whose arms have not seen the same packs in the same order, by digest."""
    lines = []
    for seed in asked.seeds:
        seen: dict[str, list[str]] = {}
        for arm in asked.names:
            if order := standing(jobs[arm, seed].folder).params.get(names.TAG_ORDER_DIGEST):
                seen.setdefault(order, []).append(arm)
        if len(seen) > 1:
            groups = " | ".join(", ".join(group) for group in seen.values())
            lines.append(f"seed {seed}: not the same batches for all arms: {groups}")
    return lines

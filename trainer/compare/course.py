"""The course of a comparison: learning rates first where that is wanted, all arms on all seeds, and the conclusion."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer import names
from trainer.addresses import Store
from trainer.compare import conclusion, parent, tuning
from trainer.compare.asked import HALVING, Asked
from trainer.compare.children import standing
from trainer.compare.description import kind_of, of_comparison
from trainer.compare.jobs import Ended
from trainer.compare.parent import Parent
from trainer.compare.stage import Failed, Jobs, is_over, job_of, missing, run_stage, told


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
        print((over[0] / conclusion.RANKING).read_text(encoding="utf-8"), end="")
        return over[0]
    asked.room(len(asked.arms) * len(asked.seeds))  # before anything is begun: more at once than there are GPUs
    with parent.opened(
        asked.output_dir, asked.identity(), store, title=f"comparison of {', '.join(asked.names)}"
    ) as of:
        of.tracker.description(of_comparison(asked, of))
        if asked.tune:
            asked = tuning.tuned(asked, of, console)
        jobs = {
            (entered.arm.name, seed): job_of(entered, seed, asked, of) for seed in asked.seeds for entered in asked.arms
        }
        if asked.policy == HALVING:
            from trainer.compare.rungs import halve  # the analysis, and torch

            failed = halve(jobs, asked, of, console)
        else:
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
    done = {arm for (arm, _), job in jobs.items() if is_over(standing(job.folder))}
    ranking = conclusion.rank(of) if len(done) > 1 or (done and not failed) else ""
    print(ranking, end="")
    if failed:
        raise Failed(told(failed, len(jobs)))
    if not ranking or not conclusion.report(of):
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

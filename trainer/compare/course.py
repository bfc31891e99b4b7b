"""The course of a comparison: which runs are still missing, all of them at once, what has failed, and the end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer import names
from trainer.addresses import Store
from trainer.compare import conclusion, parent
from trainer.compare.arms import Arm, Entered, arguments
from trainer.compare.children import Job, Standing, standing
from trainer.compare.jobs import Board, Ended, Room, room_for, run_all
from trainer.compare.parent import Parent


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be compared, and how."""

    arms: tuple[Entered, ...]
    seeds: tuple[int, ...]
    profile: str | None
    common: Mapping[str, str]
    """Dotted key -> value, of all arms."""
    output_dir: Path
    policy: str = "full"
    """full: every run to its end; halving: arms are ended early where that is safe."""
    tune: int = 0
    """Learning rates that are tried out for every arm before; 0: they are as the files say."""
    margin: float = 0.01
    """Of halving: share of the best loss that counts as no difference."""
    error: float = 0.05
    """Of halving: chance of a wrong decision, over all of them."""
    jobs: int | None = None
    """Runs at once; None: as many as there is room for."""
    gpus: tuple[str, ...] = ()
    """That may be dealt out."""

    def identity(self) -> dict[str, str]:
        """What makes two comparisons the same: all but how many run at once, and where their folders lie."""
        of_halving = {"margin": f"{self.margin:g}", "error": f"{self.error:g}"} if self.policy == "halving" else {}
        return {
            "strategies": ",".join(_written(entered.arm) for entered in self.arms),
            "seeds": ",".join(map(str, self.seeds)),
            "profile": self.profile or "",
            "policy": self.policy,
            "tune": str(self.tune),
            **of_halving,
            **dict(sorted(self.common.items())),
        }

    def room(self, runs: int, before: int | None = None) -> Room:
        """What this machine has room for; threads as they were before, since their number may change last bits.

        Raises:
            ConfigError: more is asked for than there is.
        """
        room = room_for(self.jobs, ranks=max(e.ranks for e in self.arms), gpus=self.gpus, runs=runs)
        return Room(room.jobs, before or room.threads, room.gpus, room.why)


def _written(arm: Arm) -> str:
    return f"{arm.name}={arm.strategy}" + "".join(f"+{key}={value}" for key, value in arm.settings.items())


class Failed(RuntimeError):
    """Some runs of a comparison have failed; it stays open, and the same command tries them again."""


def job_of(entered: Entered, seed: int, asked: Asked, of: Parent) -> Job:
    """The run of an arm and a seed."""
    name = f"{entered.arm.name}-seed{seed}"
    told = arguments(entered, seed, asked.profile, asked.common)
    return Job(name, told, of.path / "arms" / name, of.run_id, tags_of(entered, conclusion.ARM, of))


def tags_of(entered: Entered, role: str, of: Parent) -> dict[str, str]:
    """What a run's MLflow run says of its place in the comparison."""
    tags = {names.TAG_ROLE: role, names.TAG_ARM: entered.arm.name}
    tried = (of.known("tried") or {}).get(entered.arm.name)
    return tags | ({names.TAG_RATES_TRIED: json.dumps(tried)} if tried and role == conclusion.ARM else {})


def compare(asked: Asked, store: Store) -> Path:
    """Run a comparison to its end, or go on with it; the folder that holds it.

    Raises:
        Failed: some runs did not come to their ends.
        UserError: it cannot begin.
    """
    title = f"comparison of {', '.join(entered.arm.name for entered in asked.arms)}"[:200]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if over := parent.finished(asked.output_dir, asked.identity(), store):
        console.print(f"this comparison is finished, its folder is {over[0]}", markup=False)
        parent.join(over[1], store)
        conclusion.rank(over[1])
        return over[0]
    with parent.opened(asked.output_dir, asked.identity(), store, title=title) as of:
        of.tracker.description(description.of(asked, of))
        if asked.tune:
            asked = tuning.tuned(asked, of, console)
        jobs = {(entered.arm.name, seed): job_of(entered, seed, asked, of) for seed in asked.seeds for entered in asked.arms}
        if asked.policy == "halving":
            failed = policy.halve(jobs, asked, of, console)
        else:
            failed = run_missing([*jobs.values()], asked, of, console, "runs")
        conclude(jobs, asked, of, console, failed)
        return of.path


def conclude(
    jobs: Mapping[tuple[str, int], Job], asked: Asked, of: Parent, console: Console, failed: Sequence[Ended]
) -> None:
    """Rank what has come to its end; where all has, write the report too.

    Raises:
        Failed: some runs have not, or the report could not be written.
    """
    for line in conclusion.deliver([path for job in jobs.values() if (path := standing(job.folder).path)]):
        console.print(line, markup=False)
    for line in (said := unequal_batches(jobs, asked)):
        console.print(line, markup=False)
    over = [job for job in jobs.values() if standing(job.folder).state == "over"]
    ranked = bool(over) and conclusion.rank(of.run_id) == 0
    of.tracker.description(description.of(asked, of, jobs, said))
    if failed:
        raise Failed("\n".join([f"{len(failed)} of {len(jobs)} runs failed; the rest is done", *map(told, failed)]))
    if not ranked or not conclusion.keep(of.run_id, of.path, of.tracker):
        raise Failed(f"all runs are done, but not the report on them: see {of.path / conclusion.LOG}")
    console.print(f"report: {of.path / conclusion.REPORT}, and artifacts of run {of.run_id}", markup=False)


def told(ended: Ended) -> str:
    """One failed run: its status, the end of its log, and where that lies."""
    lines = [line for line in ended.job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    message = [n for n, line in enumerate(lines) if line.startswith(("error: ", "stopped: "))]
    last = lines[message[-1] :][:4] if message else lines[-1:]
    return "\n".join([f"{ended.job.name}: status {ended.status}, {ended.job.log}", *(f"    {line}" for line in last)])


def unequal_batches(jobs: Mapping[tuple[str, int], Job], asked: Asked) -> list[str]:
    """A line for each seed whose arms have not seen the same packs in the same order, by digest."""
    lines = []
    for seed in asked.seeds:
        seen: dict[str, list[str]] = {}
        for entered in asked.arms:
            now = standing(jobs[entered.arm.name, seed].folder)
            if order := now.params.get(names.TAG_ORDER_DIGEST):
                seen.setdefault(order, []).append(entered.arm.name)
        if len(seen) > 1:
            groups = " | ".join(", ".join(group) for group in seen.values())
            lines.append(f"seed {seed}: not the same batches for all arms: {groups}")
    return lines


def run_missing(jobs: Sequence[Job], asked: Asked, of: Parent, console: Console, what: str) -> list[Ended]:
    """Run the jobs that are not over, all that there is room for at once; those that have failed.

    Args:
        jobs: in the order in which they are started.
        asked: the comparison.
        of: its parent.
        console: for people.
        what: they are, for the display.
    """
    missing = [job for job in jobs if standing(job.folder).state != "over"]
    room = asked.room(len(missing), of.known("threads"))
    of.note(threads=room.threads)
    if missing:
        console.print(f"{len(missing)} of {len(jobs)} {what} to do, {room.why}; logs in {of.path}", markup=False)
    try:
        with Board(len(jobs), done=len(jobs) - len(missing), what=what, console=console) as board:
            return [one for one in run_all(missing, room, board) if one.status]
    except (KeyboardInterrupt, SystemExit):
        console.print("all runs are ended, resumably: the same command goes on with the comparison", markup=False)
        raise

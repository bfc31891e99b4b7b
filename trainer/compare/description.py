"""What a comparison is and how it stands, in Markdown: the description of its parent run."""

import json
from collections.abc import Mapping, Sequence

from trainer.compare.asked import HALVING, Asked
from trainer.compare.children import Job, standing
from trainer.compare.parent import Parent
from trainer.compare.stage import HALVING_LINES, RATES_TRIED
from trainer.compare.tuning import SHARE, factors, trial_seed


def kind_of(asked: Asked) -> str:
    """Whether learning rates were tuned, in a sentence: what is set by hand makes arms incomparable."""
    if not asked.tune:
        return (
            "**Hand-set** rates: every arm has those of its file, and they were not tuned alike: a difference between "
            "arms may be one between rates."
        )
    tried = ", ".join(f"{factor:g}" for factor in factors(asked.tune))
    return (
        f"**Tuned** rates: {asked.tune} for every arm ({tried} times its own vision rate; the aligner's where no part "
        f"of vision trains), on seed {trial_seed(asked.seeds)} in {SHARE:g} of the training; the best of each arm was "
        "then trained on other seeds."
    )


def of_comparison(
    asked: Asked, of: Parent, jobs: Mapping[tuple[str, int], Job] | None = None, notices: Sequence[str] = ()
) -> str:
    """The whole of it.

    Args:
        asked: the comparison.
        of: its parent.
        jobs: (arm, seed) -> its run, where they are known already.
        notices: what a reader must know.
    """
    runs = jobs or {}
    seeds = list(asked.seeds)
    lines = [f"Comparison of {len(asked.arms)} arms on seeds {', '.join(map(str, seeds))}, policy {asked.policy}.", ""]
    lines += [kind_of(asked), ""]
    for notice in notices:
        lines += [notice, ""]
    lines += ["| arm | settings | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(seeds)]
    for entered in asked.arms:
        settings = ", ".join(f"`{key}={value}`" for key, value in entered.arm.settings.items())
        cells = [_cell(runs.get((entered.arm.name, seed))) for seed in seeds]
        lines.append(f"| {entered.arm.name} | {settings or '-'} | " + " | ".join(cells) + " |")
    lines += ["", "Last eval loss of each run, nats per supervised token.", ""]
    if tried := of.known(RATES_TRIED):
        lines += [f"Rates tried: `{json.dumps(tried)}`", ""]
    if asked.policy == HALVING:
        lines += [*(of.known(HALVING_LINES) or []), ""]
    return "\n".join(lines)


def _cell(job: Job | None) -> str:
    now = standing(job.folder) if job else None
    if now is None or not now.state:
        return "-"
    loss = f"{now.evaluations[-1].loss:.4f}" if now.evaluations else "-"
    return loss if now.state == "over" else f"{loss} ({now.state})"

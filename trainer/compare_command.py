"""The command `compare`: arms on seeds, all runs below one parent, and what is told of them at the end."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from trainer.config.problems import shown
from trainer.errors import ConfigError
from trainer.options import (
    EXTRA,
    closes_mlflows_run,
    is_true,
    many_runs_options,
    one_of,
    overrides,
    quiet_libraries,
    switch,
    tell,
    whole_number,
)

STRATEGIES, SEEDS = "last6_lora,last6_full,all_lora,all_full,frozen_vision", "17,18,19"
_OF_ALL = ("model", "train_jsonl", "val_jsonl", "max_steps")
_POLICIES, _TRIALS = ("full", "halving"), ("0", "3", "5")
_MOST_JOBS = 1000

_EPILOG = """
\b
python -m trainer compare --dry_run                       what would be run, and how long it takes
python -m trainer compare --jobs 2                        five arms on three seeds, two runs at once
python -m trainer compare --strategies last6_lora,b=last6_lora+training.vit_lr=2e-4
python -m trainer compare --policy halving --tune 3       tuned alike, and the worse ones ended early

The same command goes on with a comparison that was interrupted, and tries again what has failed. Any key can be given
to all arms: --training.num_train_epochs 3
"""


@click.command(
    context_settings=EXTRA, epilog=_EPILOG, short_help="Train several strategies on several seeds; rank them."
)
@click.option(
    "--strategies",
    metavar="ARM,ARM,...",
    default=STRATEGIES,
    show_default=STRATEGIES.replace(",", ", "),
    help="What is compared; each ARM is STRATEGY or NAME=STRATEGY, with +section.key=value as often as needed.",
)
@click.option("--seeds", metavar="N,N,...", default=SEEDS, show_default=True, help="Every arm is trained on each.")
@click.option(
    "--jobs", metavar="N", default="", show_default="one a GPU; without GPUs, one a core", help="Runs at once."
)
@click.option(
    "--policy",
    metavar=f"[{'|'.join(_POLICIES)}]",
    default="full",
    show_default=True,
    help="full: every run to its end; halving: arms are ended early where that is safe.",
)
@click.option(
    "--tune",
    metavar=f"[{'|'.join(_TRIALS)}]",
    default="0",
    show_default=True,
    help="Learning rates to try for every arm first.",
)
@click.option(
    "--margin",
    metavar="SHARE",
    default="0.01",
    show_default=True,
    help="Of halving: share of the best loss that counts as no difference, above 0 and below 1.",
)
@click.option(
    "--error",
    metavar="CHANCE",
    default="0.05",
    show_default=True,
    help="Of halving: chance of a wrong decision, above 0 and below 0.5.",
)
@many_runs_options
@click.option(
    "--output_dir",
    metavar="FOLDER",
    default="output",
    show_default=True,
    help="Folder that holds the folders of comparisons.",
)
@switch("--dry_run", "--dry-run", help="Only say what would be run.")
@click.pass_context
@closes_mlflows_run()
def compare(context: click.Context, /, strategies: str, seeds: str, dry_run: str, **given: Any) -> None:
    """Train several strategies on several seeds, each run a process of its own, and rank them.

    All runs lie below one parent run in MLflow, which gets rank, plots and report. A folder of the comparison's own in
    output_dir holds the folders of all runs, ranking.txt and report/. Runs of one seed see the same batches, whatever
    the arm.

    The status is 1 where some runs have failed; the others are ranked.
    """
    from trainer.compare.arms import enter, gpus_of, parse_arms, parse_seeds
    from trainer.compare.asked import Asked
    from trainer.compare.jobs import gpus_to_deal
    from trainer.config.load import SHORT_NAMES

    common = {SHORT_NAMES[key]: given[key] for key in _OF_ALL if given[key]}
    for name, value in overrides(context.args).items():
        key = SHORT_NAMES.get(name, name)
        if key in common:
            raise ConfigError(f"-P {name}", f"{key} given twice", "one of them", "leave one out")
        common[key] = value
    if given["policy"] == "halving" and "training.eval_steps" in common:
        told = "evaluation by optimizer steps, which are not equal work for arms that accumulate differently"
        raise ConfigError("-P training.eval_steps", told, "training.eval_samples", "give that one, or none of them")
    wanted, profile = parse_seeds(seeds or SEEDS), given["profile"] or None
    arms = enter(parse_arms(strategies or STRATEGIES), wanted[0], profile, common)
    asked = Asked(
        arms, wanted, profile, common, Path(given["output_dir"] or "output"),
        policy=one_of("--policy", given["policy"] or "full", _POLICIES),
        tune=int(one_of("--tune", given["tune"] or "0", _TRIALS)),
        margin=_share("--margin", given["margin"] or "0.01"), error=_share("--error", given["error"] or "0.05", 0.5),
        jobs=whole_number("--jobs", given["jobs"], at_most=_MOST_JOBS), gpus=gpus_to_deal(gpus_of(arms)),
    )  # fmt: skip
    for resolved in {entered.resolved.path: entered.resolved for entered in arms}.values():
        tell(resolved)
    quiet_libraries()
    if is_true("--dry_run", dry_run):
        from trainer.compare import forecast

        return forecast.show(asked, Console(highlight=False, soft_wrap=True))
    return _run(asked)


def _run(asked: Any) -> None:
    from trainer.compare.course import compare as run_course
    from trainer.compare.stage import Failed
    from trainer.tracking import reach_store  # MLflow

    try:
        run_course(asked, reach_store())
    except Failed as failed:
        click.echo(f"not finished: {failed}", err=True)
        raise SystemExit(1) from None


def _share(option: str, text: str, below: float = 1.0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < below:
        raise ConfigError(option, shown(text), f"a number above 0 and below {below:g}", "write a number such as 0.01")
    return value

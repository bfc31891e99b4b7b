"""What to do after a comparison: which arm to take and how sure that is, what to run next, how to run it again."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from analysis.checks import Finding
from analysis.effects import METHODS, QUESTIONS, lacking
from analysis.ended_early import EndedEarly, ended_early, sentences, told_apart
from analysis.ranking import TRAINABLE, Ranking, Row
from analysis.runs import Run
from analysis.settings import BLOCKS, LORA_RANK, METHOD, SCHEDULE, SEED, VIT_LR, is_idle, number, same
from analysis.statistics import ALL_PAIRS, FAMILY_ERROR, seeds_to_settle
from analysis.verdict import listed, pair_of, standing
from trainer import names
from trainer.config.load import DEFAULT_PROFILE, load
from trainer.config.places import experiments_dir
from trainer.errors import ConfigError

_SEEDS_AT_ONCE = 20
"""More are not put into one command."""

ENOUGH_SEEDS = 3
"""Fewer give no interval worth reading, and no winner that can be told apart."""


_SEED = re.compile(r"-?\d+")
"""A tag may hold anything, and a command is there to be pasted."""

_PLACES = ("training.output_dir", "training.run_name")
"""Where a run lies and what it is called: of a run in a comparison both are its own, and no other may have them."""

EXPLAINED_BY = {
    "not_alike": "runs of different data, weights, code or number formats are compared",
    "accumulation": "arms do not take equally many micro-batches in a step",
    "unequal_budget": "arms did not see the same amount of data",
    "rates_not_tuned": "every arm has a hand-set learning rate of its own",
    "diverged": "not every seed has come to its end with a finite value",
    "gates": "not every run has passed a training gate",
    "gap_under_augmentation": "arms were augmented",
}
"""Check -> what else than the strategy may have made the winner."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Which arm to take."""

    arm: str
    confidence: str
    """high, moderate, low or none."""
    why: tuple[str, ...]
    """Sentences."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing worth running, and the command for it where the strategy is one of the shipped ones."""

    why: str
    command: str = ""


def recommendation(ranking: Ranking, findings: Sequence[Finding]) -> Recommendation:
    """The arm to take, with the confidence that the numbers allow.

    high: distinguishable from every other arm, three seeds or more, and no finding that could explain it otherwise.
    moderate: distinguishable from every other arm, but something else differs too. low: some arm is not
    distinguishable. none: too few seeds to tell anything.

    Args:
        ranking: of at least one arm.
        findings: of the careful reader on it.
    """
    winner, *others = ranking.rows
    if not others:
        if ended := ended_early(ranking):
            return _of_the_last(winner, ended)
        return Recommendation(winner.label, "none", ("It is the only arm: there is nothing to compare it with.",))
    stands: dict[str, list[str]] = {}
    for row in others:
        stands.setdefault(standing(ranking, row), []).append(row.label)
    told, behind = stands.get("ahead", []), stands.get("reversed", [])
    open_ones, untested = stands.get("open", []), stands.get("untested", [])
    also = [EXPLAINED_BY[check] for check in dict.fromkeys(f.check for f in findings) if check in EXPLAINED_BY]
    why = []
    if told:
        why.append(f"It is more than seed noise ahead of {listed(told)}.")
    if behind:
        why.append(f"On the seeds that both have, {listed(behind)} is better: give both arms the same seeds.")
    if open_ones:
        why.append(f"It is not distinguishable from {listed(open_ones)}.")
        cheapest = min(
            [winner, *(r for r in others if r.label in open_ones)], key=lambda r: r.estimates[TRAINABLE].mean
        )
        if cheapest is not winner:
            why.append(
                f"Of these, {cheapest.label} trains the fewest parameters: take it unless more seeds say otherwise."
            )
    if untested:
        why.append(f"Against {listed(untested)} nothing can be told with so few seeds.")
    if also:
        why.append(f"It holds for arms as they were configured: {'; '.join(also)}.")
    if untested and not told:
        confidence = "none"
    elif untested or open_ones or behind or winner.estimates[ranking.by].n < ENOUGH_SEEDS:
        confidence = "low"
    else:
        confidence = "moderate" if also else "high"
    return Recommendation(winner.label, confidence, tuple(why))


def _of_the_last(winner: Row, ended: Sequence[EndedEarly]) -> Recommendation:
    """Of the only arm that was trained to its end: never with high confidence, since curves can cross."""
    why = [*sentences(ended), "That the order stays so until the end is an assumption about the curves of these arms."]
    return Recommendation(winner.label, "moderate" if told_apart(ended) else "low", tuple(why))


def next_steps(ranking: Ranking, findings: Sequence[Finding]) -> list[Step]:
    """What would tell more: seeds, the missing cells of 2x2s, neighbours of the winner, tuned learning rates."""
    if not ranking.rows:
        return []
    steps = [*_seeds(ranking), *_missing_cells(ranking), *_missing_noise(ranking), *_neighbours(ranking)]
    if any(finding.check == "rates_not_tuned" for finding in findings):
        steps.append(
            Step(
                "Give every arm the same number of tries at its vision learning rate (half, as it is, double), then "
                "run each arm's best on fresh seeds: rates set by hand make arms incomparable."
            )
        )
    return steps


def command_of(run: Run, changes: Mapping[str, str] | None = None) -> str:
    """The command that trains a run again, with every setting that differs from the shipped file; or nothing.

    Args:
        run: as the store has it.
        changes: dotted key -> another value.

    Returns:
        Empty for a run whose strategy is not among the shipped experiments.
    """
    given = _given(run)
    return "" if given is None else _command(run.strategy, run, {**given, **(changes or {})})


def _command(strategy: str, run: Run, given: Mapping[str, str]) -> str:
    profile = run.tags.get(names.TAG_PROFILE, "")
    values = {"profile": profile} if profile not in ("", DEFAULT_PROFILE) else {}
    values |= {"seed" if key == SEED else key: value for key, value in given.items()}
    told = "".join(f" -P {shlex.quote(f'{key}={value}')}" for key, value in values.items())
    where = f" --experiment-name {shlex.quote(run.experiment)}" if run.experiment else ""
    command = f"mlflow run . -e {strategy} --env-manager local{where}{told}"
    return "" if "\n" in command or "\r" in command else command


def _given(run: Run) -> dict[str, str] | None:
    """Settings that differ from the shipped file's, and the seed; None where no shipped file is meant."""
    shipped = _shipped(run.strategy, run.tags.get(names.TAG_PROFILE, ""))
    if shipped is None or names.TAG_SOURCE in run.tags:
        return None
    if any(k.startswith("strategy.") and k not in run.params and said != "null" for k, said in shipped.items()):
        return None  # a file of the user's that happens to have the name of a shipped one, in another form
    given = {
        key: value
        for key in shipped
        if key not in _PLACES
        and not is_idle(key, run.params)
        and same(value := run.params.get(key, shipped[key])) != same(shipped[key])
    }
    if run.seed:
        given.pop(SEED, None)  # the last of them, so that the commands of an arm differ in one place
        given[SEED] = run.seed
    return given


@cache
def _shipped(strategy: str, profile: str) -> Mapping[str, str] | None:
    """Params of a shipped experiment under a profile; None where there is no such file, or it does not load alone."""
    if not (experiments_dir() / f"{strategy}.yaml").is_file() or "/" in strategy:
        return None
    try:
        return load(experiments_dir() / f"{strategy}.yaml", profile=profile or None).params()
    except ConfigError:
        return None


def _seeds(ranking: Ranking) -> list[Step]:
    """Seeds for arms with too few of them, and those that would settle what is open with the winner."""
    winner, *others = ranking.rows
    few = [row for row in ranking.rows if row.estimates[ranking.by].n < ENOUGH_SEEDS]
    steps = [
        Step(
            f"{row.label} has {row.estimates[ranking.by].n} of at least {ENOUGH_SEEDS} seeds.",
            command_of(row.readings[0].run, {SEED: _fresh_seed(row)}),
        )
        for row in few
    ]
    for row in others:
        pair = pair_of(ranking, winner, row)
        if pair is None or standing(ranking, row) != "open":
            continue
        shift = f"{winner.label} and {row.label} ({abs(pair.estimate.mean):.4f} apart)"
        if pair.method != "paired":
            steps.append(Step(f"Give the same seeds to {shift}: pairs find more than arms with seeds of their own."))
            continue
        needed = seeds_to_settle(pair, alpha=pair_alpha(ranking))
        if needed is None:
            steps.append(Step(f"No number of seeds up to 1,000 would be likely to tell {shift}: treat them as equal."))
            continue
        more = max(1, needed - pair.estimate.n)
        text = (
            f"About {needed} seeds, {more} more, would tell {shift} with 80 % power, if they differ as much and "
            "scatter as widely as seen, which few seeds say. Both arms need them: pairs are what is compared."
        )
        commands = _for_both(winner, row, more)
        steps += [Step(text, commands[0]), *(Step(f"And {row.label} on the same seeds.", c) for c in commands[1:])]
    return steps


def _for_both(one: Row, other: Row, more: int) -> list[str]:
    """Commands that give both arms more seeds in common: first those that one of them lacks, then fresh ones."""
    have = [{reading.run.seed for reading in row.readings} for row in (one, other)]
    lacking = sorted(filter(_SEED.fullmatch, have[0] ^ have[1]), key=number)
    fresh = int(_fresh_seed(one, other))
    seeds = [*lacking, *(str(fresh + i) for i in range(min(more, _SEEDS_AT_ONCE)))][: min(more, _SEEDS_AT_ONCE)]
    commands = []
    for row, own in zip((one, other), have, strict=True):
        wanted = [seed for seed in seeds if seed not in own]
        command = command_of(row.readings[0].run, {SEED: "SEED"}) if wanted else ""
        commands.append(
            f"for seed in {' '.join(wanted)}; do {command.replace('-P seed=SEED', '-P seed=$seed')}; done"
            if command
            else ""
        )
    return commands


def pair_alpha(ranking: Ranking) -> float:
    """Error rate of one pair when all of them together are to keep to 5 % (Bonferroni)."""
    tested = sum(pair.method != "untested" for pair in ranking.differences)
    if len(ranking.rows) > ALL_PAIRS:
        tested = math.comb(len(ranking.rows), 2)
    return FAMILY_ERROR / max(1, tested)


def _fresh_seed(*rows: Row) -> str:
    used = [number(reading.run.seed) for row in rows for reading in row.readings]
    known = [int(seed) for seed in used if seed == seed]
    return str(max(known) + 1) if known else "18"


def _missing_cells(ranking: Ranking) -> list[Step]:
    """Of the depths and methods that were run, the combinations that were not."""
    have: dict[tuple[str, str], Run] = {}
    for run in (*(row.readings[0].run for row in ranking.rows), *(one.run for one in ended_early(ranking))):
        if run.params.get(SCHEDULE, "null") != "null":
            continue  # blocks that begin one after another are no depth
        have.setdefault((run.params.get(BLOCKS, ""), run.params.get(METHOD, "")), run)
    steps = []
    for depth in dict.fromkeys(depth for depth, method in have if method in METHODS):
        for method in METHODS:
            if (depth, method) not in have:
                run = next(have[depth, m] for m in METHODS if (depth, m) in have)
                text = f"The 2x2 of depth and method lacks vision blocks {depth} trained by {method}."
                steps.append(Step(text, _command_for_cell(run, depth, method)))
    return steps


def _missing_noise(ranking: Ranking) -> list[Step]:
    """Arms that were not run with a disturbance, or not without it, where others were run with both."""
    steps = []
    for question in QUESTIONS.values():
        for row, level in lacking(ranking, question) if question.robustness else ():
            first, second = question.first, question.second
            text = f"The 2x2 of {first.name} and {second.name} lacks {row.label} {second.at} {level} {second.header}."
            steps.append(Step(text, command_of(row.readings[0].run, {second.key: level})))
    return steps


def _command_for_cell(run: Run, depth: str, method: str) -> str:
    """The shipped experiment of this depth and method, otherwise set as `run` is."""
    given = _given(run)
    if given is None:
        return ""
    for path in sorted(experiments_dir().glob("*.yaml")):
        shipped = _shipped(path.stem, run.tags.get(names.TAG_PROFILE, ""))
        if shipped and (shipped[BLOCKS], shipped[METHOD]) == (depth, method):
            kept = {key: value for key, value in given.items() if key not in (BLOCKS, METHOD, VIT_LR)}
            return _command(path.stem, run, kept)
    return ""


def _neighbours(ranking: Ranking) -> list[Step]:
    """The winner with more and fewer blocks, half and double the vision learning rate, half and double the rank."""
    winner = ranking.rows[0]
    run = winner.readings[0].run
    steps = []
    for key, values, what in (
        (BLOCKS, _other_blocks(run), "vision blocks"),
        (VIT_LR, _halved_and_doubled(run.params.get(VIT_LR)), "vision learning rate"),
        (LORA_RANK, _other_ranks(run) if run.params.get(METHOD) == "lora" else [], "LoRA rank"),
    ):
        tried = {same(r.readings[0].run.params.get(key)) for r in ranking.rows if r.strategy == winner.strategy}
        for value in values:
            if same(value) not in tried and run.params.get(METHOD) in METHODS:
                text = f"Neighbour of the winner: {what} {value} instead of {run.params.get(key)}."
                steps.append(Step(text, command_of(run, {key: value})))
    return steps


def _other_blocks(run: Run) -> list[str]:
    """`last-4` and `last-8` around `last-6`, `20-23` and `16-23` around `18-23`; of `all`, half and three quarters."""
    text = run.params.get(BLOCKS, "")
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = map(int, match.groups())
        return [f"{start}-{last}" for start in (first + 2, first - 2) if 0 <= start <= last]
    if text.startswith("last-") and text.removeprefix("last-").isdigit():
        n = int(text.removeprefix("last-"))
        return [f"last-{m}" for m in (n - 2, n + 2) if m > 0]
    n = len(json.loads(run.params.get(names.VISION_BLOCKS) or "[]"))
    return [f"last-{m}" for m in (n // 2, 3 * n // 4)] if text == "all" and n >= 4 else []


def _halved_and_doubled(text: str | None) -> list[str]:
    value = number(text)
    return [f"{value * factor:.6g}" for factor in (0.5, 2)] if value == value and value > 0 else []


def _other_ranks(run: Run) -> list[str]:
    value = number(run.params.get(LORA_RANK))
    return (
        [str(int(rank)) for rank in (value / 2, 2 * value) if rank >= 1 and rank == int(rank)] if value == value else []
    )

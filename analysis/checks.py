"""What a careful reader notices in a comparison: one function a check, each returns findings with their numbers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from analysis.subject import MUST_AGREE, NAN, Subject, known
from trainer import names

OVERFIT_PERCENT = 1.0
"""The end is this much above the lowest eval loss, and the lowest lies in the first half: overfitting."""
BUDGET_RATIO = 1.1
"""Arms that differ by more in what they saw or how long they ran did not have equal budgets."""
SMOOTHING_PERCENT = 3.0
"""Smoothing that moves arms against each other by more of the loss is no smoothing of noise: single evaluations of the
published runs, evaluated hundreds of times each, stray by 2.1 %."""
NO_VISION_PERCENT = 1.0
"""A vision gain below this part of the eval loss: the model hardly looks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing noticed."""

    check: str
    """Name of the check, a key of `CHECKS`."""
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What it rests on, named."""


def overfitting(subject: Subject) -> list[Finding]:
    """The lowest eval loss lies in the first half, and the end is clearly above it."""
    found = [
        arm
        for arm in subject.arms
        if arm.lowest_step < 0.5 * arm.final_step and arm.eval_loss > arm.lowest * (1 + OVERFIT_PERCENT / 100)
    ]
    if not found:
        return []
    who = "Every arm" if len(found) == len(subject.arms) else ", ".join(arm.name for arm in found)
    part = max(arm.lowest_step / arm.final_step for arm in found)
    arms = [arm for arm in subject.arms if known(arm.lowest)]
    by_lowest = [arm.name for arm in sorted(arms, key=lambda arm: arm.lowest)]
    same = by_lowest == [arm.name for arm in arms]
    listed = "; ".join(
        f"{arm.name} {arm.lowest:.4f} at step {arm.lowest_step:,.0f}, {arm.eval_loss:.4f} at the end" for arm in found
    )
    return [
        Finding(
            "overfitting",
            f"{who} overfits: the lowest eval loss comes within {100 * part:.0f} % of the steps ({listed}). Ranked by "
            f"it, the order is {'the same' if same else ', '.join(by_lowest)}.",
            {f"{arm.name} lowest": arm.lowest for arm in found} | {f"{arm.name} end": arm.eval_loss for arm in found},
        )
    ]


def unequal_budget(subject: Subject) -> list[Finding]:
    """Arms saw different amounts of data, whatever their steps say."""
    unit = "samples" if all(known(arm.samples) for arm in subject.arms) else "micro-batches"
    seen = {arm.name: arm.samples if unit == "samples" else arm.micro_batches for arm in subject.arms}
    if not _differ(seen.values()):
        return []
    most = max(seen, key=seen.__getitem__)
    by_name = {arm.name: arm for arm in subject.arms}
    listed = ", ".join(f"{name} {value:,.0f}" for name, value in seen.items())
    text = f"Arms did not see the same amount of data: {listed} {unit}."
    if all(by_name[most].final_step < arm.final_step for arm in subject.arms if arm.name != most):
        text += f" {most} took the fewest steps ({by_name[most].final_step:,.0f}) and was further along than any other."
    hours = [arm.hours for arm in subject.arms]
    stopped = any(arm.stopped_early for arm in subject.arms)
    if all(map(known, hours)) and min(hours) >= 0.1 and not _differ(hours) and not stopped:
        text += f" All ran equally long ({min(hours):.1f} to {max(hours):.1f} hours): none was stopped early."
    return [Finding("unequal_budget", text + f" Compare at equal {unit}.", seen)]


def accumulation(subject: Subject) -> list[Finding]:
    """A step is not the same amount of work in every arm."""
    found = {arm.name: arm.accumulation for arm in subject.arms if known(arm.accumulation)}
    if len(set(found.values())) < 2:
        return []
    listed = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
    text = f"Accumulation differs ({listed}): equal steps are not equal data, and curves over steps mislead."
    return [Finding("accumulation", text, found)]


def points_after_the_end(subject: Subject) -> list[Finding]:
    """A curve has values after the run's last step."""
    return [
        Finding(
            "points_after_the_end",
            f"{arm.name} ended at step {arm.final_step:,.0f}, and values are given at "
            f"{', '.join(f'{step:,}' for step in sorted(arm.after_the_end))}: they cannot be measurements.",
            {f"step {step}": loss for step, loss in sorted(arm.after_the_end.items())},
        )
        for arm in subject.arms
        if arm.after_the_end
    ]


def margins(subject: Subject) -> list[Finding]:
    """Printed margins are not what the printed losses give."""
    if not subject.arms:
        return []
    winner = subject.arms[0].ranked
    found = []
    for arm in subject.arms[1:]:
        printed = subject.margins.get(arm.name, NAN)
        margin = 100 * (arm.ranked - winner) / winner if winner else NAN
        if known(printed) and f"{margin:.1f}" != f"{printed:.1f}":
            text = (
                f"The margin of {arm.name} is {arm.ranked - winner:.4f}/{winner:.4f} = {margin:.3f} %, of the winner's "
                f"loss; {printed} % was printed."
            )
            found.append(Finding("margins", text, {"computed": margin, "printed": printed}))
    return found


def effective_batch(subject: Subject) -> list[Finding]:
    """The printed effective batch is not micro-batch x accumulation x ranks."""
    if subject.effective_batch is None:
        return []
    computed = [arm.micro_batch * arm.accumulation * subject.ranks for arm in subject.arms]
    low, high = subject.effective_batch
    if not all(map(known, computed)) or (min(computed), max(computed)) == (low, high):
        return []
    text = (
        f"The effective batch is printed as {low:.0f} to {high:.0f}; micro-batch x accumulation x ranks gives "
        f"{min(computed):.0f} to {max(computed):.0f} packs. What a pack holds must be counted, in samples and tokens."
    )
    return [Finding("effective_batch", text, {"computed low": min(computed), "computed high": max(computed)})]


def one_seed(subject: Subject) -> list[Finding]:
    """Arms with a single seed: no difference can be told from the noise of seeds."""
    found = [arm.name for arm in subject.arms if arm.n_seeds == 1]
    if not found:
        return []
    who = (
        "Every arm has"
        if len(found) == len(subject.arms)
        else f"{', '.join(found)} {'has' if len(found) == 1 else 'have'}"
    )
    return [Finding("one_seed", f"{who} one seed: whether a difference is more than seed noise cannot be told.")]


def diverged(subject: Subject) -> list[Finding]:
    """Seeds that ended without a finite value: an arm's mean is that of the seeds that went well."""
    return [
        Finding(
            "diverged",
            f"{arm.n_diverged} of {arm.n_diverged + arm.n_seeds} runs of {arm.name} have no finite value: its mean is "
            "that of those that went well.",
            {arm.name: float(arm.n_diverged)},
        )
        for arm in subject.arms
        if arm.n_diverged
    ]


def best_fit_disagrees(subject: Subject) -> list[Finding]:
    """Raw and smoothed train loss name different arms as the best fit."""
    arms = [arm for arm in subject.arms if known(arm.train_loss) and known(arm.train_loss_smoothed)]
    if len(arms) < 2:
        return []
    raw = min(arms, key=lambda arm: arm.train_loss)
    smoothed = min(arms, key=lambda arm: arm.train_loss_smoothed)
    if raw.name == smoothed.name:
        return []
    text = (
        f"Which arm fits best depends on smoothing: {smoothed.name} by smoothed train loss "
        f"({smoothed.train_loss_smoothed:.4f} for {raw.train_loss_smoothed:.4f}), {raw.name} by the raw one "
        f"({raw.train_loss:.4f} for {smoothed.train_loss:.4f})."
    )
    return [Finding("best_fit_disagrees", text, {raw.name: raw.train_loss, smoothed.name: smoothed.train_loss})]


def full_fits_better(subject: Subject) -> list[Finding]:
    """It is claimed that full fine-tuning fits better, and an arm trained fully fits worse than one with LoRA."""
    if not subject.full_fits_better:
        return []
    against = [
        (full, lora)
        for full in subject.arms
        for lora in subject.arms
        if full.method == "full" and lora.method == "lora" and full.train_loss_smoothed > lora.train_loss_smoothed
    ]
    return [
        Finding(
            "full_fits_better",
            f"Full fine-tuning is said to reach lower training loss; {full.name} has {full.train_loss_smoothed:.4f}, "
            f"{lora.name} {lora.train_loss_smoothed:.4f}.",
            {full.name: full.train_loss_smoothed, lora.name: lora.train_loss_smoothed},
        )
        for full, lora in against
    ]


def full_needs_accumulation(subject: Subject) -> list[Finding]:
    """It is claimed that full fine-tuning needs so much accumulation, and an arm trained fully ran with less."""
    needed = subject.full_needs_accumulation
    return [
        Finding(
            "full_needs_accumulation",
            f"Full fine-tuning is said to need accumulation {needed:.0f}; {arm.name} ran with {arm.accumulation:.0f}.",
            {arm.name: arm.accumulation},
        )
        for arm in subject.arms
        if arm.method == "full" and arm.accumulation < needed
    ]


def not_alike(subject: Subject) -> list[Finding]:
    """Runs of different base weights, data, code or number formats in one ranking."""
    findings = []
    for key, what in MUST_AGREE.items():
        values = {value: [arm.name for arm in subject.arms if value in arm.facts.get(key, ())]
                  for arm in subject.arms for value in arm.facts.get(key, ())}  # fmt: skip
        if len(values) > 1:
            listed = "; ".join(f"{value[:12]}: {', '.join(arms)}" for value, arms in sorted(values.items()))
            findings.append(Finding("not_alike", f"Runs differ in {what} ({listed}).", {"kinds": float(len(values))}))
    return findings


def rates_not_tuned(subject: Subject) -> list[Finding]:
    """Kinds of arms have vision learning rates of their own that were not tried equally often."""
    tries: dict[tuple[str, str, str], dict[str, float]] = {}
    for arm in subject.arms:
        if known(arm.vit_lr) and arm.method in ("lora", "full"):
            tries.setdefault((arm.blocks, arm.method, arm.rank), {})[arm.name] = arm.vit_lr
    counts = {len({*of_kind.values()}) for of_kind in tries.values()}
    rates = {name: rate for of_kind in tries.values() for name, rate in of_kind.items()}
    if len({*rates.values()}) < 2 or (len(counts) == 1 and min(counts) > 1):
        return []
    listed = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    often = "tried once" if counts == {1} else f"tried {min(counts)} to {max(counts)} times"
    text = f"Vision learning rates were not tuned equally ({listed}; {often} each): an arm may win by its rate."
    return [Finding("rates_not_tuned", text, rates)]


def gates(subject: Subject) -> list[Finding]:
    """Arms whose runs have not proved that what was planned has trained."""
    found = [arm.name for arm in subject.arms if arm.gate != {"passed"}]
    text = f"No training gate in {', '.join(found)}: that the named tensors have trained is not proved."
    return [Finding("gates", text)] if found else []


def f1_disagrees(subject: Subject) -> list[Finding]:
    """Eval loss and F1 order the arms differently."""
    arms = [arm for arm in subject.arms if known(arm.f1) and known(arm.eval_loss)]
    if not any(a.eval_loss < b.eval_loss and a.f1 < b.f1 for a in arms for b in arms):  # a tie is no disagreement
        return []
    by_loss = [arm.name for arm in sorted(arms, key=lambda arm: arm.eval_loss)]
    by_f1 = [arm.name for arm in sorted(arms, key=lambda arm: -arm.f1)]
    text = f"Eval loss orders the arms {', '.join(by_loss)}; F1 {', '.join(by_f1)}."
    return [Finding("f1_disagrees", text, {arm.name: arm.f1 for arm in arms})]


def smoothing(subject: Subject) -> list[Finding]:
    """Ranked by a smoothed loss, in which an arm that was evaluated more seldom has more of its early losses."""
    arms = [arm for arm in subject.arms if arm.ranked == arm.eval_loss_smoothed and known(arm.eval_loss)]
    added = {arm.name: arm.ranked - arm.eval_loss for arm in arms}
    if not arms or max(added.values()) - min(added.values()) <= SMOOTHING_PERCENT / 100 * arms[0].eval_loss:
        return []
    listed = ", ".join(f"{name} {value:+.4f}" for name, value in added.items())
    text = (
        f"Smoothing adds unequally to the eval losses ({listed}): early losses weigh more in arms that were evaluated "
        f"more seldom. Rank by {names.EVAL_LOSS}."
    )
    return [Finding("smoothing", text, added)]


def does_not_look(subject: Subject) -> list[Finding]:
    """The loss hardly changes when images are exchanged: the model answers without looking."""
    found = {arm.name: arm.vision_gain for arm in subject.arms
             if arm.vision_gain < NO_VISION_PERCENT / 100 * arm.eval_loss}  # fmt: skip
    listed = ", ".join(f"{name} {gain:.4f}" for name, gain in found.items())
    text = f"The vision gain is next to nothing ({listed}): the model hardly looks at the image."
    return [Finding("does_not_look", text, found)] if found else []


def rate_at_the_edge(subject: Subject) -> list[Finding]:
    """The winner has the lowest or the highest of the vision learning rates that were tried for its kind of arm."""
    if not subject.arms:
        return []
    winner = subject.arms[0]
    alike = [a for a in subject.arms if (a.blocks, a.method, a.rank) == (winner.blocks, winner.method, winner.rank)]
    rates = sorted({arm.vit_lr for arm in alike if known(arm.vit_lr)})
    if len(rates) < 2 or rates[0] < winner.vit_lr < rates[-1]:
        return []
    side = "lowest" if winner.vit_lr == rates[0] else "highest"
    text = (
        f"{winner.name} has the {side} vision learning rate tried for it ({winner.vit_lr:g} of "
        f"{', '.join(f'{rate:g}' for rate in rates)}): a better one may lie beyond."
    )
    return [Finding("rate_at_the_edge", text, {"rate": winner.vit_lr, "lowest": rates[0], "highest": rates[-1]})]


def gap_under_augmentation(subject: Subject) -> list[Finding]:
    """Train loss was measured on augmented images and eval loss was not: their difference is no memorization."""
    found = {arm.name: arm.gap for arm in subject.arms if arm.augmentation != "off" and known(arm.gap)}
    if not found:
        return []
    listed = ", ".join(f"{name} {gap:.4f}" for name, gap in found.items())
    text = f"Trained on augmented images: the gap ({listed}) mixes memorization with harder images; read the clean gap."
    modes: dict[str, list[str]] = {}
    for arm in subject.arms:
        modes.setdefault(arm.augmentation, []).append(arm.name)
    if len(modes) > 1:
        listed = "; ".join(f"{mode}: {', '.join(arms)}" for mode, arms in modes.items())
        text += (
            f" Arms differ in how training samples were changed ({listed}): train loss and {names.GAP} cannot be "
            f"compared between these, {names.GAP_CLEAN} and eval loss can."
        )
    return [Finding("gap_under_augmentation", text, found)]


CHECKS: dict[str, Callable[[Subject], list[Finding]]] = {
    check.__name__: check
    for check in (
        one_seed, diverged, overfitting, unequal_budget, accumulation, points_after_the_end, margins, effective_batch,
        best_fit_disagrees, full_fits_better, full_needs_accumulation, not_alike, rates_not_tuned, gates, f1_disagrees,
        does_not_look, rate_at_the_edge, gap_under_augmentation, smoothing,
    )
}  # fmt: skip


def careful_reading(subject: Subject) -> list[Finding]:
    """All findings of all checks, in the table's order."""
    return [finding for check in CHECKS.values() for finding in check(subject)]


def _differ(values: Iterable[float]) -> bool:
    all_of_them = list(values)
    return bool(all_of_them) and all(map(known, all_of_them)) and max(all_of_them) > BUDGET_RATIO * min(all_of_them)

"""What `predict` shows: where the adapter comes from, a bar while images are captioned, and a summary."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trainer.checkpoint import MANIFEST, file_sha256
from trainer.inference.checkpoint_source import checkpoint_of
from trainer.inference.image_files import find_images
from trainer.inference.job import PICTURES, PREDICTIONS, Job, Summary
from trainer.inference.predictor import load_predictor

_TOLD = 10
"""Images without an answer that are named."""


def show_predictions(
    source: str,
    images: Sequence[Path],
    out: Path,
    *,
    base: str,
    device: str,
    batch_size: int,
    max_new_tokens: int | None,
    pictures: bool,
) -> int:
    """Caption images into a folder, and tell what was done.

    Returns:
        How many images have no answer.

    Raises:
        UserError: source, base, device, images or folder cannot be used.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    found = find_images(images, but_below=out / PICTURES)
    folder = checkpoint_of(source)
    predictor = load_predictor(folder, base=base, device=device, max_new_tokens=max_new_tokens)
    recipe = predictor.recipe
    errors.print(f"{recipe.strategy}, seed {recipe.seed}, on {recipe.base_model}: {folder}", markup=False)
    asked = {"max_new_tokens": max_new_tokens, "pictures": pictures, "images": [str(path.resolve()) for path in images]}
    key = {"checkpoint": file_sha256(folder / MANIFEST), **asked}
    job = Job(out, found, key, pictures=pictures)
    todo = len(found.images) - job.summary.earlier
    steps = job.run(predictor, batch_size=batch_size)
    for _ in track(steps, "captioning", total=todo, console=errors, disable=not errors.is_terminal, transient=True):
        pass
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(job.summary, out, pictures=pictures):
        console.print(line, markup=False)
    return len(job.summary.problems)


def _lines(summary: Summary, out: Path, *, pictures: bool) -> list[str]:
    done = summary.images - summary.earlier
    rate = f"; {done} in {summary.seconds:.1f} s, {done / summary.seconds:.2f} images/s" if done else ""
    earlier = f", {summary.earlier} of them by an earlier command" if summary.earlier else ""
    states = ", ".join(f"{count} {state}" for state, count in summary.states.most_common())
    lines = [f"{summary.images} images{earlier}, {summary.objects} objects{rate}", f"answers: {states or 'none'}"]
    lines += [f"  {count:>6} x {what}" for what, count in summary.repairs.most_common()]
    named = list(summary.problems.items())[:_TOLD]
    lines += [f"no answer: {name}: {problem}" for name, problem in named]
    if len(summary.problems) > _TOLD:
        lines.append(f"no answer: {len(summary.problems) - _TOLD} more, see {out / PREDICTIONS}")
    if summary.missing:
        lines.append(f"note: no font here has {' '.join(sorted(summary.missing)[:12])}, drawn as boxes")
    return [*lines, f"{out / PREDICTIONS}" + (f" and {out / PICTURES}" if pictures else "")]

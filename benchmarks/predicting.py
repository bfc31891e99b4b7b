"""Measures how fast `predict` answers, beside transformers' `generate` under the same adapter on the same images.

    python -m benchmarks.predicting measure output/RUN/best      # a pocket run's adapter, on a CPU to itself
    python -m benchmarks.predicting random 4b                    # a 4B of random weights in bf16: needs a GPU
    python -m benchmarks.predicting tables                       # fills "How fast" of docs/use.md

Both decode greedily, up to the same number of new tokens, and are loaded in one process. They take turns, and who
begins changes with every turn: image by image where one is answered at a time, else with all images. Each has answered
once before anything is timed, and a turn that other processes disturb is done again. `measure` draws scenes of digits
that no arm has been trained on. Its contenders are

- `predict`: `Predictor`, from files to objects, as the command does it;
- `predict, drawn`: the command's `Job`, with predictions.jsonl and a picture of each image;
- `generate`: `plain_generate.py`, from files to texts; they are not read into objects.

A cold start is a whole process about one image, from its start to its end. Texts of `predict` are compared with those
of `generate`: the same; its beginning, where `predict` has ended an answer that was complete or went in circles; or
another. Weights drawn at random say nothing and never end: those answers all have as many tokens as are allowed.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks import gpu_model, plain_generate
from benchmarks.machine import facts
from benchmarks.predicting_page import COLD, DRAWN, OURS, PAGE, PLAIN, RESULTS, ROOT, filled
from trainer.attention import PACKED_SDPA
from trainer.data.digits import ensure_digits
from trainer.data.images import image_sizes
from trainer.data.records import Picture, Record, read_records
from trainer.inference.image_files import Found
from trainer.inference.job import Job
from trainer.inference.predictor import Predictor, load_predictor
from trainer.inference.recipe import Recipe
from trainer.model import folder_of, load_tools

CASES = ((1, 40), (4, 24), (16, 48), (64, 64))
"""Images at once, and how many in all."""
QUIET, TRIES = 0.05, 20
"""Cores that others may keep busy at a turn, else it is done again; and how often in a case at most."""
PATIENCE = 300
"""Seconds that a turn waits at most for others to rest before it begins."""
SEED = 4711
"""Of the scenes; no run has it."""
RANDOM_CASES, RANDOM_SIDE, RANDOM_TOKENS = ((1, 8), (16, 32)), 1024, 128
"""Cases, pixels of a side and new tokens where weights are random."""

Answer = Callable[[Sequence[Path], int], list[str]]
"""Says something about each image, so many at once."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model, loaded in both ways."""

    predictor: Predictor
    plain: plain_generate.Plain
    about: dict[str, Any]
    """What it is, JSON-able."""
    length: Callable[[str], int]
    """Tokens of an answer."""

    def contenders(self, folder: Path) -> dict[str, Answer]:
        """Who takes part; pictures go into the folder."""
        return {
            OURS: self._texts,
            DRAWN: lambda paths, batch_size: self._drawn(paths, batch_size, folder),
            PLAIN: lambda paths, batch_size: self.plain.answers(paths, batch_size=batch_size),
        }

    def _texts(self, paths: Sequence[Path], batch_size: int) -> list[str]:
        made = dict(self.predictor.predict(_sized(paths), batch_size=batch_size))
        return [made[index].text for index in range(len(paths))]

    def _drawn(self, paths: Sequence[Path], batch_size: int, folder: Path) -> list[str]:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            job = Job(Path(out), Found(Path(), tuple(_sized(paths)), {}), {}, pictures=True)
            for _ in job.run(self.predictor, batch_size=batch_size):
                pass
        return []


def _sized(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, int]]]:
    return [(path, size) for path, size in image_sizes(paths).items() if not isinstance(size, str)]


def trained_subject(adapter: Path, max_new_tokens: int) -> Subject:
    """An adapter of a run on pocket."""
    predictor = load_predictor(adapter, device="cpu", max_new_tokens=max_new_tokens)
    recipe = predictor.recipe
    plain = plain_generate.load(
        folder_of(recipe.base_model), adapter, messages_of(recipe), dtype="float32", max_new_tokens=max_new_tokens
    )
    about = {"model": recipe.base_model, "arm": recipe.strategy, "seed": recipe.seed, "step": recipe.step}
    about |= {"dtype": recipe.torch_dtype, "max_new_tokens": max_new_tokens}
    return Subject(predictor, plain, about, lambda text: len(plain.tokenizer(text).input_ids))


def random_subject(size: str, device: str) -> Subject:
    """A model of random weights under `last6_lora`; `tiny` takes a moment on a CPU.

    Its tokens are no words of the tokenizer that it borrows, so texts are their numbers.
    """
    name = f"random:{size}"
    of = gpu_model.prepare("last6_lora", gpu_model.Shape(), torch.device(device), tiny=size == "tiny")
    base, model = of.model.get_base_model(), of.model.eval()
    tokenizer = load_tools(name).tokenizer
    for config in (base.config, base.model.config):
        for kind in ("image", "video"):
            setattr(config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    as_peft_loads = copy.deepcopy(model)
    for what, parameter in as_peft_loads.named_parameters():
        if ".modules_to_save." in what:  # full copies of a bf16 base
            parameter.data = parameter.data.bfloat16()
    base.set_attn_implementation({"text_config": PACKED_SDPA, "vision_config": "sdpa"})
    recipe = Recipe(
        strategy="last6_lora", seed=17, training_key="", base_model=name, base_digest="", train_digest="",
        val_digest="", torch_dtype="bfloat16", scheme="A", language="en", emit_norm="norm1000", taxonomy=None,
        max_length=20_000, max_pixels=None,
    )  # fmt: skip
    predictor = Predictor(model, recipe, max_new_tokens=RANDOM_TOKENS)
    plain = plain_generate.Plain(as_peft_loads, folder_of(name), messages_of(recipe), max_new_tokens=RANDOM_TOKENS)
    tokenizers: tuple[Any, ...] = (predictor._encoder.tokenizer, plain.tokenizer)
    for tokens in tokenizers:
        tokens.batch_decode = lambda rows, **_: [" ".join(map(str, row)) for row in rows.tolist()]
    about = {"model": name, "arm": "last6_lora", "dtype": "bfloat16", "max_new_tokens": RANDOM_TOKENS}
    return Subject(predictor, plain, about, lambda text: len(text.split()))


def messages_of(recipe: Recipe) -> list[dict[str, Any]]:
    """What the run's prompts say about one image."""
    record = Record("any", (Picture(Path("any"), 96, 96),), ())
    return recipe.encoder(load_tools(recipe.base_model)).messages(record)


def digits(folder: Path, count: int) -> list[Path]:
    """Handwritten digits on grounds as in validation, drawn for this."""
    made = ensure_digits(folder, seed=SEED, n_train=1, n_val=count, n_ood=1)
    return [record.images[0].path for record in read_records(made.val).records]


def noise(folder: Path, count: int, side: int) -> list[Path]:
    """Images for a model that sees nothing."""
    draw, paths = np.random.default_rng(SEED), []
    for index in range(count):
        paths.append(folder / f"{index}.jpg")
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@dataclass(frozen=True, slots=True)
class Turns:
    """What every contender took and said, turn by turn."""

    seconds: dict[str, list[float]]
    texts: dict[str, list[list[str]]]
    others: float
    """Cores that other processes kept busy, at the turn where they did so most."""


def timed(contenders: Mapping[str, Answer], turns: Sequence[Sequence[Path]], batch_size: int) -> Turns:
    """Let contenders take turns; who begins goes round, and a turn that others disturb is done again."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    texts: dict[str, list[list[str]]] = {name: [] for name in contenders}
    names, most, again = list(contenders), 0.0, 0
    for turn, paths in enumerate(turns):
        first = turn % len(names)
        while True:
            _wait_for_others()
            busy, began, took, said = _of_others(), time.perf_counter(), {}, {}
            for name in names[first:] + names[:first]:
                started = time.perf_counter()
                said[name] = contenders[name](paths, batch_size)
                took[name] = time.perf_counter() - started
            others = max(0.0, _of_others() - busy) / (time.perf_counter() - began)
            if others <= QUIET or again == TRIES:
                break
            again += 1
        most = max(most, others)
        for name in names:
            seconds[name].append(took[name])
            texts[name].append(said[name])
    return Turns(seconds, texts, most)


def compared(ours: Sequence[str], plain: Sequence[str]) -> dict[str, int]:
    """How many texts are the same, how many are the other's beginning, and how many differ."""
    same = sum(a == b for a, b in zip(ours, plain, strict=True))
    beginnings = sum(a != b and b.startswith(a) for a, b in zip(ours, plain, strict=True))
    return {"same": same, "beginning": beginnings, "other": len(ours) - same - beginnings}


def one_case(
    contenders: Mapping[str, Answer], paths: Sequence[Path], batch_size: int, repetitions: int
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Runs of a case, what comparing its texts gives, and the texts of `predict`."""
    turns = [[path] for path in paths] if batch_size == 1 else [paths] * repetitions
    done = timed(contenders, turns, batch_size)
    runs = _runs(done, batch_size, len(turns[0]))
    ours, plain = ([text for said in done.texts[name] for text in said] for name in (OURS, PLAIN))
    answers = {"batch": batch_size, **compared(ours, plain)}
    return runs, answers, ours[: len(paths)]


def _runs(done: Turns, batch: int | str, images: int) -> list[dict[str, Any]]:
    told = {name: round(median(of), 3) for name, of in done.seconds.items()}
    print(f"{batch} at once: median seconds {told}, others {done.others:.2f}", flush=True)
    return [
        {"by": name, "batch": batch, "images": images, "others": done.others, "seconds": of}
        for name, of in done.seconds.items()
    ]


def whole_processes(adapter: Path, image: Path, subject: Subject, max_new_tokens: int, times: int) -> list[Any]:
    """Cold starts, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "messages.json"
        request.write_text(json.dumps(messages_of(subject.predictor.recipe)), encoding="utf-8")
        ours = [sys.executable, "-m", "trainer", "predict", str(adapter), str(image), "--device", "cpu"]
        ours += ["--max_new_tokens", str(max_new_tokens), "--out"]
        base = str(folder_of(subject.predictor.recipe.base_model))
        plain = [sys.executable, "-P", plain_generate.__file__, base, str(adapter), str(request), str(max_new_tokens)]

        def process(*command: str) -> list[str]:
            environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            return []

        count = iter(range(10**6))
        contenders: dict[str, Answer] = {
            OURS: lambda *_: process(*ours, f"{folder}/{next(count)}", "--pictures", "false"),
            DRAWN: lambda *_: process(*ours, f"{folder}/{next(count)}"),
            PLAIN: lambda *_: process(*plain, str(image)),
        }
        return _runs(timed(contenders, [[image]] * times, 1), COLD, 1)


def measure(
    subject: Subject, paths: Sequence[Path], folder: Path, cases: Sequence[tuple[int, int]], repetitions: int
) -> dict[str, Any]:
    """All cases within this process."""
    contenders = subject.contenders(folder)
    for answer in contenders.values():
        answer(paths[:1], 1)
    runs: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    alone: list[str] = []
    for batch_size, count in cases:
        made, found, texts = one_case(contenders, paths[:count], batch_size, repetitions)
        alone = alone or texts
        found["as_alone"] = sum(a == b for a, b in zip(alone, texts, strict=False))
        runs += made
        answers.append(found)
    tokens = sorted(map(subject.length, texts))
    with Image.open(paths[0]) as image:
        size = image.size
    return {
        "facts": facts(),
        **subject.about,
        "device": str(subject.plain.model.device),
        "threads": torch.get_num_threads(),
        "image": size,
        "answer_tokens": [tokens[0], int(median(tokens)), tokens[-1]],
        "runs": runs,
        "answers": answers,
    }


def _wait_for_others() -> None:
    for _ in range(PATIENCE):
        busy = _of_others()
        time.sleep(1)
        if _of_others() - busy <= QUIET:
            return


def _of_others() -> float:
    """CPU seconds that others than this process, and those that it started and saw end, have spent on this machine."""
    machine: Any = psutil.cpu_times()
    return float(sum(machine[:8]) - machine.idle - machine.iowait - sum(psutil.Process().cpu_times()[:4]))


def _written(result: Mapping[str, Any], name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    on_pocket = commands.add_parser("measure", help="a trained adapter on the CPU")
    on_pocket.add_argument("adapter", type=Path, help="a checkpoint's folder, of a run on pocket")
    on_pocket.add_argument("--max_new_tokens", type=int, default=256, help="of an answer")
    at_random = commands.add_parser("random", help="a model of random weights")
    at_random.add_argument("size", choices=("tiny", "4b"))
    at_random.add_argument("--device", default="cuda")
    for each in (on_pocket, at_random):
        each.add_argument("--repetitions", type=int, default=3, help="turns of each contender")
        each.add_argument("--threads", type=int, help="of torch; as many as there are cores by default")
        each.add_argument("--limit", type=int, default=64, help="images at most, for a look at whether it runs")
        each.add_argument("--out", default="", help="name of the file of results")
    commands.add_parser("tables", help="fill docs/use.md")
    asked = parser.parse_args()
    if asked.command == "tables":
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if asked.threads:
        torch.set_num_threads(asked.threads)
    whole = CASES if asked.command == "measure" else RANDOM_CASES
    cases = list(dict.fromkeys((min(batch, asked.limit), min(count, asked.limit)) for batch, count in whole))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.command == "measure":
            subject, paths = trained_subject(asked.adapter, asked.max_new_tokens), digits(folder, asked.limit)
        else:
            subject = random_subject(asked.size, asked.device)
            paths = noise(folder, asked.limit, RANDOM_SIDE if asked.size != "tiny" else 64)
        result = measure(subject, paths, folder, cases, asked.repetitions)
        if asked.command == "measure":
            result["runs"] += whole_processes(asked.adapter, paths[0], subject, asked.max_new_tokens, asked.repetitions)
        elif asked.device != "cpu":
            result["gpu"] = torch.cuda.get_device_name(subject.plain.model.device)
    _written(result, asked.out or ("pocket.json" if asked.command == "measure" else f"random_{asked.size}.json"))


if __name__ == "__main__":
    main()

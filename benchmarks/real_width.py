"""Trains a random-weight slice of Qwen3-VL-4B at its real width under the published profile, as a user would.

    python benchmarks/real_width.py --vision-blocks 8 --max-steps 20     # two arms, each with and without ZeRO-2

Width, vocabulary and number formats are the 4B's; the text layers are cut to four, and the vision blocks to as many as
are asked for, so that a CPU can take the steps. Weights are random, so losses say that the machinery learns and nothing
about the data. The tokenizer is pocket's. Runs go one after the other, each as a process of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.progress import track
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from trainer import names
from trainer.architectures import qwen3_vl_config
from trainer.data.digits import ensure_digits
from trainer.model import POCKET

ROOT = Path(__file__).parents[1]
ARMS = ("last6_lora", "all_full")
TEXT_LAYERS = 4  # the fewest that train all: the third DeepStack merger's output enters behind the third layer
BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
MARKS = {"image": "<|image_pad|>", "video": "<|video_pad|>",
         "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}  # fmt: skip
FITS_A_CPU = {
    "launch.nproc": 1,  # memory is that of one process, with one copy of the model
    "training.per_device_train_batch_size": 1,
    "custom.allow_outside_root": "true",  # `shortened` copies the records, not the images
    "tracking.generate_records": 0,
    "tracking.probe_records": 4,
    "tracking.vision_gain_records": 0,
    "training.logging_steps": 1,
}
COLUMNS = ("arm", "ZeRO-2", "run", "gate", "loss, first step", "loss, last step", "steps", "seconds a step",
           "peak memory, GB", "trainable parameters", "dtypes of trained parts")  # fmt: skip


def write_model(folder: Path, vision_blocks: int, seed: int) -> None:
    """A slice of the 4B with random weights in Hugging Face layout, bfloat16, with pocket's tokenizer beside it."""
    config = qwen3_vl_config("4b")
    vision, text = config.vision_config, config.text_config
    # in the released depth of 24 a DeepStack tap follows every quarter but the last
    taps = [(tap + 1) * vision_blocks // vision.depth - 1 for tap in vision.deepstack_visual_indexes]
    vision.depth, vision.deepstack_visual_indexes = vision_blocks, taps
    text.num_hidden_layers = TEXT_LAYERS
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    for key, token in MARKS.items():
        setattr(config, f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in BESIDE_WEIGHTS:
        shutil.copy(POCKET / name, folder / name)


def shortened(source: Path, target: Path, count: int) -> None:
    """A copy of the first records of a JSONL file that may lie anywhere: its image paths are absolute."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:count]]
    for record in records:
        record["images"] = [str((source.parent / image).resolve()) for image in record["images"]]
    target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def command(arm: str, zero: bool, work: Path, arguments: argparse.Namespace) -> list[str]:
    """What a user would type: the published profile, their model and records, and what makes it fit a CPU."""
    line = [sys.executable, "-m", "trainer", "run", arm, "--profile", "published", "--model", str(work / "model")]
    line += ["--train_jsonl", str(work / "train.jsonl"), "--val_jsonl", str(work / "val.jsonl")]
    line += ["--max_steps", str(arguments.max_steps), "--output_dir", str(work / "output")]
    settings = FITS_A_CPU | {"deepspeed.enabled": str(zero).lower(), "training.run_name": run_name(arm, zero)}
    settings |= {"global_max_length": arguments.length, "training.eval_steps": arguments.max_steps}
    return line + [word for key, value in settings.items() for word in (f"--{key}", str(value))] + arguments.extra


def run_name(arm: str, zero: bool) -> str:
    """Under which name a run is found again in the store."""
    return f"{arm}-{'zero2' if zero else 'plain'}"


def row(client: MlflowClient, arm: str, zero: bool) -> str:
    """One line of the table, of the newest run of this name; a run that never came to be says so."""
    experiment = client.get_experiment_by_name(names.EXPERIMENT)
    wanted = f"tags.mlflow.runName = '{run_name(arm, zero)}'"
    runs = client.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment else []
    cells = measured(client, runs[0]) if runs else ["no run, see its log"] + ["-"] * (len(COLUMNS) - 3)
    return "| " + " | ".join([arm, "yes" if zero else "no", *cells]) + " |"


def measured(client: MlflowClient, run: Run) -> list[str]:
    """Status, gate and numbers of a run, as cells; a step's seconds are the median without the first step."""
    params, metrics = run.data.params, run.data.metrics

    def history(metric: str) -> list[float]:
        return [point.value for point in client.get_metric_history(run.info.run_id, metric)]

    losses, seconds = history(names.TRAIN_LOSS), sorted(set(history(names.TRAIN_SECONDS)))
    steps = [after - before for before, after in pairwise(seconds) if before > 0]
    counts = {key: int(params.get(names.TRAINABLE_PARAMETERS + key, 0)) for key in ("total", *names.PARTS)}
    formats = [f"{part} {params.get(names.DTYPE + part)}" for part in names.PARTS if counts[part]]
    return [
        run.info.status,
        run.data.tags.get(names.TAG_GATE, "-"),
        *([f"{losses[0]:.3f}", f"{losses[-1]:.3f}"] if losses else ["-", "-"]),
        str(len(losses)),
        f"{statistics.median(steps):.1f}" if steps else "-",
        f"{metrics.get(names.PEAK_MEMORY, float('nan')) / 1e9:.1f}",
        f"{counts['total']:,}",
        ", ".join(formats),
    ]


def main() -> None:
    """Make the model and the records, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for model, records, runs and logs; default: a temporary one")
    parser.add_argument("--vision-blocks", type=int, default=24, help="depth of the vision tower, 6 to 24")
    parser.add_argument("--max-steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--length", type=int, default=1024, help="tokens per pack")
    parser.add_argument("--val-records", type=int, default=8)
    arguments, arguments.extra = parser.parse_known_args()  # what is left goes to the trainer
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="real-width-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{work / 'mlflow.db'}"}
    write_model(work / "model", arguments.vision_blocks, seed=17)
    digits = ensure_digits(work / "digits")
    shortened(digits.train, work / "train.jsonl", 384)
    shortened(digits.val, work / "val.jsonl", arguments.val_records)
    pairs = [(arm, zero) for arm in ARMS for zero in (False, True)]
    for arm, zero in track(pairs, "runs"):
        with (work / f"{run_name(arm, zero)}.log").open("w") as log:
            line = command(arm, zero, work, arguments)
            subprocess.run(line, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * (len(COLUMNS) - 1)]
    print("\n".join(lines + [row(client, arm, zero) for arm, zero in pairs]))


if __name__ == "__main__":
    main()

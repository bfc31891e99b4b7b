"""What we save is usable without us: plain transformers and PEFT, in an environment of their own, agree on the loss."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from mlflow import MlflowClient

from trainer import build, names
from trainer.config.load import load
from trainer.model import POCKET, load_tools

ROOT = Path(__file__).parents[1]
OVERRIDES = {"training.max_steps": "12", "training.eval_steps": "6", "tracking.generate_records": "0"}


def environment_without_us(folder: Path) -> Path:
    """A virtual environment with torch, transformers and PEFT at our pins, and nothing of this project."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [pin for pin in pins if pin.split("==")[0] in ("torch", "transformers", "peft", "accelerate", "pillow")]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for packages in ([p for p in wanted if p.startswith("torch")], wanted):  # torch first: nothing may pull another
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["last6_lora", "all_full"])
def test_plain_transformers_and_peft_reproduce_the_eval_loss(
    arm: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best and last checkpoint, eval loss over the whole validation set, to 1e-6 (float32 sums in another order)."""
    shared = tmp_path_factory.getbasetemp() / "plain"
    python = shared / "bin" / "python" if shared.exists() else environment_without_us(shared)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    flags = [flag for key, value in OVERRIDES.items() for flag in (f"--{key}", value)]
    command = [sys.executable, "-m", "trainer", "run", arm, "--output_dir", str(tmp_path / "out"), *flags]
    subprocess.run(command, check=True, cwd=tmp_path)

    config = load(arm).config
    data = build.read_data(config)
    encoder = build.make_encoder(config, load_tools("pocket"), data.taxonomy)
    conversations = [
        {"image": str(r.images[0].path), "messages": encoder.messages(r)[:2], "answer": encoder.answer(r)}
        for r in data.val.records
    ]
    (tmp_path / "conversations.json").write_text(json.dumps(conversations), encoding="utf-8")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(names.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, names.EVAL_LOSS)}
    (output,) = (path.parent for path in (tmp_path / "out").glob("*/run.json"))
    for kind in ("best", "last"):
        step = json.loads((output / kind / "manifest.json").read_text())["step"]
        script = [
            python,
            ROOT / "tests/portable/eval_adapter.py",
            POCKET,
            output / kind,
            tmp_path / "conversations.json",
        ]
        loss = float(subprocess.run(script, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
        assert loss == pytest.approx(history[step], rel=1e-6), kind

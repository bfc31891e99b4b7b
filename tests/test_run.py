"""A whole run: bit-identical when repeated; FAILED, with the tensors named, when a part of it does not train."""

import json
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from tests.running import SMALL, empty_store, environment, flags, runs_in, trained, trainer
from trainer import names
from trainer.config.load import load
from trainer.gate import GateFailed
from trainer.run import run


def exact_rows(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric that `names` calls exact: its (step, value) rows."""
    logged = client.get_run(run_id).data.metrics
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        for name in logged
        if names.metric(name).exact
    }


def test_the_same_seed_twice_is_bit_identical(tmp_path: Path) -> None:
    """Every exact metric at every step, and every byte of the adapters, in another process that draws no sheet."""
    first = trained()
    store = empty_store(tmp_path)
    settings = {**SMALL, "tracking.preview_records": "0"}
    done = trainer("run", "last6_lora", "--seed", "3", *flags(settings), cwd=tmp_path, store=store)
    assert done.returncode == 0, done.stderr
    (second,) = runs_in(store)
    artifacts = MlflowClient(store).list_artifacts(second.info.run_id)
    assert names.ARTIFACT_PREVIEW not in [artifact.path for artifact in artifacts]
    rows = exact_rows(MlflowClient(store), second.info.run_id)
    assert len(rows) > 20
    assert rows == exact_rows(first.client, first.run.info.run_id)

    def weights(folder: Path) -> dict[str, str]:
        manifests = sorted((folder / "output").glob("*/*/manifest.json"))
        files = {m.parent.name: json.loads(m.read_text())["files"] for m in manifests}
        return {kind: listed["adapter_model.safetensors"]["sha256"] for kind, listed in files.items()}

    assert set(weights(tmp_path)) == {"best", "last"}
    assert weights(tmp_path) == weights(first.folder)


@pytest.mark.parametrize("arm", ["last6_lora", "all_full"])
def test_a_run_with_reentrant_checkpointing_ends_failed_with_the_tensors_named(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself, in a real run: status, tag, artifact and message say what did not train; nothing was saved."""
    store = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    enable = Qwen3VL.gradient_checkpointing_enable
    monkeypatch.setattr(Qwen3VL, "gradient_checkpointing_enable", lambda self, _: enable(self, {"use_reentrant": True}))
    # the fused pass checkpoints by itself, and has no such form
    overrides = {**SMALL, "training.gradient_checkpointing": "true", "model.fused": "false"}
    with pytest.raises(GateFailed, match=r"visual\.blocks\.\d+\..*no gradient"):
        run(load(arm, overrides=overrides))
    (failed,) = runs_in(store)
    assert failed.info.status == "FAILED"
    assert failed.data.tags[names.TAG_GATE] == "failed"
    report = json.loads(
        Path(MlflowClient(store).download_artifacts(failed.info.run_id, names.ARTIFACT_GATE)).read_text()
    )
    assert report["verdict"] == "failed"
    assert report["faults"] and all("model.visual.blocks." in name for name in report["faults"])
    assert not list(tmp_path.rglob("manifest.json"))


def test_gradient_checkpointing_as_we_do_it_changes_no_loss(tmp_path: Path) -> None:
    """Non-re-entrant, behind a frozen prefix: the same losses, to float tolerance, and the gate passes."""
    store = empty_store(tmp_path)
    changed = {**SMALL, "training.gradient_checkpointing": "true"}
    done = trainer("run", "last6_lora", "--seed", "3", *flags(changed), cwd=tmp_path, store=store)
    assert done.returncode == 0, done.stderr
    (checkpointed,) = runs_in(store)
    assert checkpointed.data.tags[names.TAG_GATE] == "passed"
    plain = trained().run.data.metrics
    for name in (names.TRAIN_LOSS, names.EVAL_LOSS):
        assert checkpointed.data.metrics[name] == pytest.approx(plain[name], rel=1e-5)  # recomputed sums, same order


def test_a_terminal_sees_a_progress_bar_and_a_pipe_plain_lines(tmp_path: Path) -> None:
    """`script` gives the run a terminal; piped output, as of the run that other tests share, has none of its codes."""
    store = empty_store(tmp_path)
    done = trained()
    assert "\x1b[" not in done.stderr
    assert "step 1/3" in done.stderr
    small = {**SMALL, "training.max_steps": "1", "tracking.generate_records": "0"}
    command = ["script", "-qec", "python -m trainer run frozen_vision " + " ".join(flags(small)), "/dev/null"]

    shown = subprocess.run(command, cwd=tmp_path, env=environment(store), capture_output=True, text=True, check=True)
    assert "\x1b[" in shown.stdout
    assert "1/1" in shown.stdout


@pytest.mark.parametrize("arm", ["last6_full", "all_lora"])
def test_a_bf16_base_trains_saves_and_captions(arm: str, tmp_path: Path) -> None:
    """From the first evaluation to the generated captions, trained tensors in float32 and the gate passed."""
    store = empty_store(tmp_path)
    done = trainer("run", arm, "--model.torch_dtype", "bfloat16", *flags(SMALL), cwd=tmp_path, store=store)
    assert done.returncode == 0, done.stderr
    (bf16,) = runs_in(store)
    assert bf16.data.tags[names.TAG_GATE] == "passed"
    assert {bf16.data.params[names.DTYPE + part] for part in ("vision", "aligner", "llm")} == {"float32"}
    assert names.F1 in bf16.data.metrics

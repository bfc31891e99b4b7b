"""The tracking contract: what one real run of the shipped `last6_lora` leaves in MLflow, names and numbers."""

import hashlib
import json
import math
import re
from itertools import accumulate, islice, pairwise

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.running import SMALL, Trained, trained
from trainer import names
from trainer.build import prepare
from trainer.config.load import load

LOOKS = {"card", "ruled", "weave"}
"""The domains of the built-in validation data."""
BLOCKS = list(range(18, 24))


@pytest.fixture(scope="module")
def done() -> Trained:
    """The shared run: `last6_lora`, seed 3, three optimizer steps."""
    return trained()


def test_the_run_is_finished_in_our_experiment_under_strategy_and_seed(done: Trained) -> None:
    """Where nobody names an experiment, ours is made."""
    assert done.run.info.status == "FINISHED"
    assert done.run.info.run_name == "last6_lora-seed3"
    assert done.client.get_experiment(done.run.info.experiment_id).name == "stage_3_vision_comparison"


def test_every_metric_that_names_lists_is_logged_and_no_other(done: Trained) -> None:
    """`names.py` is the whole list; the losses by domain share one entry."""
    by_domain = {names.EVAL_LOSS_BY_DOMAIN + look for look in LOOKS}
    assert set(done.run.data.metrics) == set(names.METRICS) | by_domain
    assert all(names.metric(name).unit for name in done.run.data.metrics)


def test_no_name_is_a_slash_prefix_of_another(done: Trained) -> None:
    """Some stores and exports make folders of the slashes."""
    data = done.run.data
    everything = {*data.metrics, *data.params, *data.tags}
    clashes = [(a, b) for a in everything for b in everything if b.startswith(a + "/")]
    assert clashes == []


def test_params_hold_the_whole_resolved_configuration(done: Trained) -> None:
    """Dotted keys, lists as JSON, and beside them what was resolved from the model."""
    expected = load("last6_lora", overrides={"seed": "3", **SMALL}).params()
    assert {key: done.run.data.params[key] for key in expected} == expected
    assert len(expected) > 60
    beside = {key: value for key, value in done.run.data.params.items() if key not in expected}
    assert json.loads(beside.pop("vision.blocks_resolved")) == BLOCKS
    parts = {part: int(beside.pop(f"trainable_parameters/{part}")) for part in names.PARTS}
    assert all(parts.values()) and sum(parts.values()) == int(beside.pop("trainable_parameters/total"))
    assert {part: beside.pop(f"dtype/{part}") for part in names.PARTS} == dict.fromkeys(names.PARTS, "float32")
    assert beside.pop("effective_batch.packs") == "2"
    assert beside.pop("image_processor") == "Qwen2VLImageProcessorPil"
    assert beside == {"skipped_records/train": "0", "skipped_records/val": "0", "skipped_records/ood": "0"}


def test_tags_say_which_arm_seed_code_data_and_base(done: Trained) -> None:
    """What analysis looks runs up by."""
    tags = done.run.data.tags
    assert {key: tags[key] for key in ("strategy", "seed", "profile", "training_gate")} == {
        "strategy": "last6_lora",
        "seed": "3",
        "profile": "pocket",
        "training_gate": "passed",
    }
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|[0-9].*", tags["code.version"])
    for key in ("data.train_digest", "data.val_digest", "base_model.digest"):
        assert re.fullmatch("[0-9a-f]{32}", tags[key]), key


def test_dataset_inputs_carry_digest_and_context(done: Trained) -> None:
    """The MLflow UI shows them; the digests are those of the tags."""
    inputs = {pair.tags[0].value: (pair.dataset.name, pair.dataset.digest) for pair in done.run.inputs.dataset_inputs}
    tags = done.run.data.tags
    assert inputs["train"] == ("train", tags["data.train_digest"])
    assert inputs["validation"] == ("val", tags["data.val_digest"])
    assert inputs["out_of_domain"][0] == "ood"
    assert all(re.fullmatch("[0-9a-f]{32}", digest) for _, digest in inputs.values())


def test_the_description_is_markdown_that_says_what_trains(done: Trained) -> None:
    """Shown at the top of the run's page."""
    text = done.run.data.tags["mlflow.note.content"]
    assert text.startswith("**last6_lora**, seed 3, profile pocket")
    assert "| vision | lora |" in text and "| aligner | full |" in text and "| llm | lora |" in text


def test_a_row_has_one_step_and_one_time(done: Trained) -> None:
    """Training rows at steps 1, 2 and 3: everything in one has one timestamp."""
    row = [names.TRAIN_LOSS, names.TRAIN_LOSS_SMOOTHED, names.PEAK_MEMORY, names.GRAD_NORM + "total"]
    row += [names.LEARNING_RATE + part for part in names.PARTS]
    histories = [[(m.step, m.timestamp) for m in done.history(name)] for name in row]
    assert [step for step, _ in histories[0]] == [1, 2, 3]
    assert all(history == histories[0] for history in histories)
    evaluated = [
        [(m.step, m.timestamp) for m in done.history(name)]
        for name in (names.EVAL_LOSS, names.OOD_LOSS, names.GAP_CLEAN, names.EVAL_LOSS_BY_DOMAIN + "card")
    ]
    assert [step for step, _ in evaluated[0]] == [0, 2, 3]
    assert all(history == evaluated[0] for history in evaluated)


def test_logged_learning_rates_are_those_of_the_formula(done: Trained) -> None:
    """Three steps, one of them warm-up: the peak, half way down the cosine, the floor; in every part."""
    scale = float(done.run.data.params["training.lr_scale"])
    peaks = {"vision": 1.2e-4, "aligner": 1e-4, "llm": 1e-4}
    floor = 1e-6 * scale
    for part, unscaled in peaks.items():
        peak = unscaled * scale
        expected = [peak, floor + (peak - floor) * (1 + math.cos(math.pi / 2)) / 2, floor]
        assert [m.value for m in done.history(names.LEARNING_RATE + part)] == pytest.approx(expected, rel=1e-12)


def test_gaps_smoothing_and_best_follow_from_the_logged_losses(done: Trained) -> None:
    """Recomputed here from the rows alone, by TensorBoard's debiased formula at weight 0.6."""

    def smoothed(values: list[float]) -> list[float]:
        out, total = [], 0.0
        for n, value in enumerate(values, start=1):
            total = 0.6 * total + 0.4 * value
            out.append(total / (1 - 0.6**n))
        return out

    train, evaluation = ([m.value for m in done.history(n)] for n in (names.TRAIN_LOSS, names.EVAL_LOSS))
    train_smoothed, eval_smoothed = smoothed(train), smoothed(evaluation)
    assert [m.value for m in done.history(names.TRAIN_LOSS_SMOOTHED)] == pytest.approx(train_smoothed, rel=1e-12)
    assert [m.value for m in done.history(names.EVAL_LOSS_SMOOTHED)] == pytest.approx(eval_smoothed, rel=1e-12)
    gaps = [eval_smoothed[i] - train_smoothed[i] for i in (1, 2)]  # evaluated at 2 and 3, as trained rows 2 and 3
    assert [(m.step, m.value) for m in done.history(names.GAP)] == [
        (2, pytest.approx(gaps[0])),
        (3, pytest.approx(gaps[1])),
    ]
    probe = [m.value for m in done.history(names.PROBE_LOSS)]
    clean = [e - p for e, p in zip(evaluation, probe, strict=True)]
    assert [m.value for m in done.history(names.GAP_CLEAN)] == pytest.approx(clean, abs=1e-12)
    assert done.history(names.BEST_LOSS)[-1].value == min(evaluation)
    assert done.history(names.BEST_STEP)[-1].value == [0, 2, 3][evaluation.index(min(evaluation))]


def test_counters_count_what_was_trained_on(done: Trained) -> None:
    """The samples that the plan of packs puts into each step, of 32 an epoch; seconds and tokens only grow."""
    plan = prepare(load("last6_lora", overrides={"seed": "3", **SMALL})).budget.plan
    per_step = [sum(len(indices) for (indices,) in step) for step in islice(plan.steps(), 3)]
    assert all(6 <= count <= 10 for count in per_step)
    expected = dict(enumerate([0, *accumulate(per_step)]))
    assert {m.step: m.value for m in done.history(names.SAMPLES_SEEN)} == expected
    assert {m.step: m.value for m in done.history(names.EPOCH)} == {k: v / 32 for k, v in expected.items()}
    for name in (names.TOKENS_SEEN, names.SUPERVISED_TOKENS_SEEN, names.TRAIN_SECONDS):
        values = [value for _, value in sorted({(m.step, m.value) for m in done.history(name)})]
        assert values[0] == 0 and all(a < b for a, b in pairwise(values)), name
    assert done.run.data.metrics[names.TOKENS_SEEN] > done.run.data.metrics[names.SUPERVISED_TOKENS_SEEN]


def test_the_resolved_configuration_reloads_to_an_equal_one(done: Trained) -> None:
    """The artifact alone, without a profile, is the run's configuration."""
    again = load(done.artifact(names.ARTIFACT_CONFIG))
    assert again.profile is None
    assert again.config == load("last6_lora", overrides={"seed": "3", **SMALL}).config


def test_record_losses_add_up_to_the_logged_eval_losses(done: Trained) -> None:
    """Token-weighted means over the records of the Parquet file: whole set, each domain, out of domain."""
    table = pq.read_table(done.artifact(names.ARTIFACT_RECORD_LOSSES)).to_pandas()
    assert set(table["at"]) == {"best", "last"}

    def mean(rows) -> float:
        return rows["loss_sum"].sum() / rows["tokens"].sum()

    def at_step(name: str, step: int) -> float:
        return {m.step: m.value for m in done.history(name)}[step]

    for at in ("best", "last"):
        rows = table[table["at"] == at]
        (step,) = set(rows["step"])
        manifest = json.loads(done.artifact(names.ARTIFACT_CHECKPOINTS).read_text())[at]
        assert step == manifest["step"]  # the evaluation behind the checkpoint of that name
        evaluated = rows[rows["set"] == "eval"]
        assert len(set(evaluated["record_id"])) == len(evaluated) == 8
        assert all(re.fullmatch(r"val\.jsonl:\d+", name) for name in evaluated["record_id"])
        assert mean(evaluated) == pytest.approx(at_step(names.EVAL_LOSS, step), rel=1e-12)
        assert mean(rows[rows["set"] == "ood"]) == pytest.approx(at_step(names.OOD_LOSS, step), rel=1e-12)
        for look, of_look in evaluated.groupby("domain"):
            assert mean(of_look) == pytest.approx(at_step(names.EVAL_LOSS_BY_DOMAIN + look, step), rel=1e-12)
        exchanged = rows[rows["set"] == "exchanged_images"]
        right = evaluated[evaluated["record_id"].isin(exchanged["record_id"])]
        if len(exchanged):  # not measured at every evaluation
            assert mean(exchanged) - mean(right) == pytest.approx(at_step(names.VISION_GAIN, step), rel=1e-9)


def test_the_parameter_plan_lists_every_tensor_of_the_base(done: Trained) -> None:
    """With part, method and the rule that caught it; what it calls trained is what the gate looked at."""
    plan = json.loads(done.artifact(names.ARTIFACT_PLAN).read_text())
    assert plan["vision_blocks"] == BLOCKS
    assert {t["method"] for t in plan["tensors"]} == {"frozen", "lora", "full"}
    assert all(t["name"] and t["part"] in names.PARTS and t["rule"] for t in plan["tensors"])
    total = int(done.run.data.params["trainable_parameters/total"])
    assert plan["trainable_parameters"]["total"] == total
    gate = json.loads(done.artifact(names.ARTIFACT_GATE).read_text())
    assert gate["verdict"] == "passed" and gate["faults"] == {}
    planned = sum({"lora": 2, "full": 1, "frozen": 0}[t["method"]] for t in plan["tensors"])
    assert len(gate["trained"]) == planned
    assert all(t["gradient_norm"] > 0 and t["update_norm"] > 0 for t in gate["trained"].values())
    assert all(re.fullmatch("[0-9a-f]+", digest) for digest in gate["frozen"].values())


def test_the_checkpoint_manifest_holds_the_right_digests(done: Trained) -> None:
    """SHA-256 of every file of the adapters at best and last, recomputed."""
    manifests = json.loads(done.artifact(names.ARTIFACT_CHECKPOINTS).read_text())
    assert set(manifests) == {"best", "last"} and manifests["last"]["step"] == 3
    for manifest in manifests.values():
        folder = done.folder / manifest["path"]
        assert "adapter_model.safetensors" in manifest["files"]
        assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
        for name, file in manifest["files"].items():
            data = (folder / name).read_bytes()
            assert file == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    size = sum(p.stat().st_size for p in (done.folder / manifests["last"]["path"]).iterdir())
    assert done.run.data.metrics[names.CHECKPOINT_BYTES] == size


def test_the_environment_artifact_names_versions_and_no_paths(done: Trained) -> None:
    """Enough to build it again, nothing private."""
    text = done.artifact(names.ARTIFACT_ENVIRONMENT).read_text()
    environment = json.loads(text)
    assert {"torch", "transformers", "peft", "mlflow"} <= set(environment["packages"])
    assert environment["processors"] >= 1 and environment["python"].startswith("3.")
    assert str(done.folder) not in text and "/home" not in text and "/root" not in text


def test_captions_are_kept_beside_the_truth(done: Trained) -> None:
    """Of the best checkpoint, and of the last where that is another; one line a record."""
    lines = done.artifact("best_" + names.ARTIFACT_PREDICTIONS).read_text(encoding="utf-8").splitlines()
    assert len(lines) == int(SMALL["tracking.generate_records"])
    assert all({"record_id", "text"} <= set(json.loads(line)) for line in lines)


def test_a_sheet_of_training_records_is_logged(done: Trained) -> None:
    """Two of the 32, as on disk: this run has no augmentation."""
    with Image.open(done.artifact(names.ARTIFACT_PREVIEW)) as sheet:
        assert sheet.format == "PNG" and sheet.width > sheet.height > 600


def test_the_terminal_shows_progress_as_lines_and_ends_with_the_result(done: Trained) -> None:
    """Not a terminal here: plain lines on standard error; the result and how to open it on standard output."""
    assert "\x1b" not in done.stderr + done.stdout
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    others = [line for line in done.stderr.splitlines() if line not in steps]
    assert len(steps) >= 6 and [line.split()[0] for line in others] == ["captioning"]
    for words in ("eval loss, final", "eval loss, best", "generalization gap", "vision gain", "training gate"):
        assert words in done.stdout
    assert done.run.info.run_id in done.stdout
    assert done.stdout.splitlines()[-1] == f"look at it: mlflow ui --backend-store-uri {done.store}"


def test_yaml_of_the_artifact_has_every_section(done: Trained) -> None:
    """Every default is written out, so that a later version with other defaults reads the same run."""
    sections = yaml.safe_load(done.artifact(names.ARTIFACT_CONFIG).read_text(encoding="utf-8"))
    assert {"model", "template", "prompts", "tuner", "strategy", "training", "data", "custom", "tracking"} <= set(
        sections
    )

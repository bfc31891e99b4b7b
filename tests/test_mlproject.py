"""`mlflow run .` as it is typed: it adopts the run that MLflow makes, passes every `-P` on, and ends as what it was."""

import os
import shutil
import signal
import string
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from mlflow import MlflowClient

from analysis.__main__ import cli as analysis_cli
from tests.running import ROOT, SMALL, answer_signals, empty_store, environment, runs_in
from trainer import names
from trainer.__main__ import cli
from trainer.config.load import load

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
ENTRY_POINTS: dict[str, dict[str, Any]] = PROJECT["entry_points"]
STRATEGIES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml") if path.stem != "base")
SWEEPS = {f"{path.stem}_sweep": path.stem for path in (ROOT / "experiments" / "sweeps").glob("*.yaml")}
DATA = {"validate", "preview"}
USE = {"predict", "export"}
ANALYSIS = {"rank", "plot", "report", "gallery", "promote", "import_published", "import_tensorboard"}
EXPERIMENT = "X"


def command(entry: str, parameters: dict[str, str]) -> list[str]:
    """`mlflow run` from another folder, in the environment we are in."""
    values = [part for key, value in parameters.items() for part in ("-P", f"{key}={value}")]
    start = ["mlflow", "run", str(ROOT), "-e", entry, "--env-manager", "local", "--experiment-name", EXPERIMENT]
    return [*start, *values]


def mlflow_run(entry: str, parameters: dict[str, str], folder: Path, store: str) -> subprocess.CompletedProcess[str]:
    """To its end."""
    return subprocess.run(
        command(entry, parameters), cwd=folder, env=environment(store), capture_output=True, text=True, timeout=300
    )


# --- the file -----------------------------------------------------------------------------------------------------


def test_every_experiment_file_has_an_entry_point_of_its_name() -> None:
    """A new strategy is one YAML file and one entry; beside them are the general one, data, the base, the analysis."""
    others = {"main", "compare", "sweep", "sync", "pocket_base"}
    assert set(ENTRY_POINTS) == {*others, *SWEEPS, *DATA, *USE, *STRATEGIES, *ANALYSIS}


def test_the_environment_is_that_of_conda_yaml() -> None:
    """What plain `mlflow run .` builds."""
    assert PROJECT["conda_env"] == "conda.yaml" and (ROOT / "conda.yaml").is_file()


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_an_entry_point_runs_without_parameters_and_uses_every_one_it_has(entry: str) -> None:
    """Each has a default, stands in the command under its own name, and is an option there."""
    point = ENTRY_POINTS[entry]
    used = {field for _, field, _, _ in string.Formatter().parse(point["command"]) if field}
    assert used == set(point["parameters"])
    assert all("default" in parameter for parameter in point["parameters"].values())
    words = point["command"].split()
    package = "analysis" if entry in ANALYSIS else "trainer"
    assert words[:3] == ["python", "-m", package]
    of_command = (analysis_cli if entry in ANALYSIS else cli).commands[words[3]]
    options = {name for parameter in of_command.params for name in (*parameter.opts, parameter.name)}
    assert {word for word in words if word.startswith("--")} - {"--"} <= options  # a bare -- ends them
    assert used <= {option.removeprefix("--") for option in options}
    if entry in STRATEGIES:
        assert words[3:5] == ["run", entry]
    if entry in SWEEPS:
        assert words[3:5] == ["sweep", SWEEPS[entry]]
        assert {"file", *point["parameters"]} == set(ENTRY_POINTS["sweep"]["parameters"])


def test_every_short_option_of_run_is_a_parameter_of_every_strategy() -> None:
    """`-P seed=18` works wherever `--seed 18` does; under `mlflow run` nothing can pause (see `options`)."""
    options = {p.name for p in cli.commands["run"].params if isinstance(p, click.Option)} - {"pause_after_samples"}
    for entry in STRATEGIES:
        assert set(ENTRY_POINTS[entry]["parameters"]) == options
    assert set(ENTRY_POINTS["main"]["parameters"]) == options | {"config"}


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, subprocess.CompletedProcess[str]]:
    """`last6_lora` with short names, full names, and values spelt otherwise than we spell them."""
    folder = tmp_path_factory.mktemp("mlflow-run")
    store = empty_store(folder)
    parameters = {
        **SMALL,
        "seed": "18",
        "profile": "pocket",  # the name of a tag of ours
        "training.vit_lr": "1e-4",  # a param of ours, which we write 0.0001
        "training.bf16": "no",  # and this one false
        "output_dir": str(folder / "out put"),
        "tracking.generate_records": "0",
    }
    parameters["max_steps"] = parameters.pop("training.max_steps")
    return store, folder, mlflow_run("last6_lora", parameters, folder, store)


def test_mlflow_run_trains_and_our_run_is_its_run(done: tuple[str, Path, subprocess.CompletedProcess[str]]) -> None:
    """Exactly one run in the experiment, FINISHED, under our name, with MLflow's source and ours of everything else."""
    store, _, process = done
    assert process.returncode == 0, process.stderr
    (run,) = runs_in(store, EXPERIMENT)
    assert runs_in(store) == []
    assert (run.info.status, run.info.run_name) == ("FINISHED", "last6_lora-seed18")
    assert run.data.tags["mlflow.project.entryPoint"] == "last6_lora"
    assert run.data.tags["strategy"] == "last6_lora" and run.data.tags["training_gate"] == "passed"
    assert run.data.metrics[names.SAMPLES_SEEN] == 24
    assert run.info.run_id in process.stdout


def test_every_parameter_reaches_the_command(done: tuple[str, Path, subprocess.CompletedProcess[str]]) -> None:
    """The resolved configuration, not the params, is what trained."""
    store, folder, _ = done
    (run,) = runs_in(store, EXPERIMENT)
    config = load(MlflowClient(store).download_artifacts(run.info.run_id, names.ARTIFACT_CONFIG)).config
    assert (config.training.seed, config.training.max_steps, config.training.vit_lr) == (18, 3, 1e-4)
    assert config.training.bf16 is False
    assert config.custom.digits.train == 32 and config.tracking.generate_records == 0
    assert config.training.output_dir == str(folder / "out put")
    assert len(list((folder / "out put").glob("*/last/adapter_model.safetensors"))) == 1


def test_an_existing_file_runs_through_main_with_its_own_launch_line(tmp_path: Path) -> None:
    """`config`, `model`, and `gpus`, which is no parameter of the entry point, reach the command."""
    store = empty_store(tmp_path)
    parameters = {
        "config": "tests/fixtures/existing/configs/all_full.yaml",
        "model": "pocket",
        "gpus": "0",
        "max_steps": "2",
        "output_dir": str(tmp_path / "out"),
        "training.gradient_accumulation_steps": "1",
        "deepspeed.enabled": "false",  # compiling a part of it takes half a minute
        "tracking.generate_records": "0",
    }
    process = mlflow_run("main", parameters, tmp_path, store)
    assert process.returncode == 0, process.stderr
    (run,) = runs_in(store, EXPERIMENT)
    assert run.data.tags["strategy"] == "all_full" and run.data.tags["training_gate"] == "passed"
    assert (run.data.params["gpus"], run.data.params["launch.gpus"]) == ("0", "0")
    assert "launch.gpus: there is no GPU here (-P)" in process.stderr


def test_params_that_mlflow_logged_from_p_stay_and_ours_come_beside_them(
    done: tuple[str, Path, subprocess.CompletedProcess[str]],
) -> None:
    """A param can be written once: theirs in the user's spelling, the rest of the configuration from us."""
    (run,) = runs_in(done[0], EXPERIMENT)
    params, tags = run.data.params, run.data.tags
    assert (params["training.vit_lr"], params["training.bf16"]) == ("1e-4", "no")
    assert (params["seed"], params["training.seed"], tags["seed"]) == ("18", "18", "18")
    assert (params["profile"], tags["profile"]) == ("pocket", "pocket")
    assert params["tuner.lora_rank"] == "16"
    everything = {*params, *run.data.metrics, *tags}
    assert [(a, b) for a in everything for b in everything if b.startswith(a + "/")] == []


def test_a_relative_store_and_the_default_one_lie_where_mlflow_run_was_started(
    tmp_path: Path,
) -> None:
    """MLflow's own default, taken over by the command that runs in the project's folder."""
    store = empty_store(tmp_path)
    process = subprocess.run(
        command("last6_lora", {"tuner.lora_rank": "0"}),
        cwd=tmp_path, env=environment(None), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 1
    (run,) = runs_in(store, EXPERIMENT)
    assert "tuner.lora_rank" in run.data.tags["mlflow.note.content"]


# --- mistakes, hostile values, Ctrl-C -----------------------------------------------------------------------------


def test_a_mistake_ends_as_failed_with_its_message(tmp_path: Path) -> None:
    """`mlflow run` itself says 1 for any failure; the run is FAILED, never RUNNING."""
    store = empty_store(tmp_path)
    process = mlflow_run("main", {"config": "last6_lora", "tuner.lora_rnak": "8"}, tmp_path, store)
    assert process.returncode == 1
    assert "did you mean tuner.lora_rank?" in process.stderr
    (run,) = runs_in(store, EXPERIMENT)
    assert run.info.status == "FAILED"
    assert "did you mean tuner.lora_rank?" in run.data.tags["mlflow.note.content"]


def test_a_value_with_shell_characters_arrives_as_one_literal(tmp_path: Path) -> None:
    """Spaces, quotes, `;` and `$()`, in a declared parameter and in an extra one: refused as what they are."""
    store = empty_store(tmp_path)
    trap = tmp_path / "trap"
    hostile = f"""a 'b' "c"; touch {trap}; $(touch {trap}) `touch {trap}` | touch {trap} & {{x}} # """
    process = mlflow_run("last6_lora", {"model": hostile, "training.seed": hostile}, tmp_path, store)
    assert process.returncode == 1
    assert not trap.exists()
    assert "2 mistakes" in process.stderr and "Traceback (most recent call last)" not in process.stderr
    said = process.stderr.split("2 mistakes")[1]
    assert repr(hostile)[:100] in said and "-P training.seed" in said
    (run,) = runs_in(store, EXPERIMENT)
    assert run.info.status == "FAILED"


def test_ctrl_c_under_mlflow_run_ends_the_run(tmp_path: Path) -> None:
    """The terminal interrupts both; MLflow terminates us while we are closing the run, and then writes FAILED over our
    KILLED (it compares a status in words with one in numbers, so that no status ever counts as ended).
    """
    store = empty_store(tmp_path)
    endless = SMALL | {"training.num_train_epochs": "10000", "output_dir": str(tmp_path / "out")}
    del endless["training.max_steps"]
    process = subprocess.Popen(
        command("frozen_vision", endless),
        cwd=tmp_path, env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=answer_signals,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not any(names.TRAIN_LOSS in run.data.metrics for run in runs_in(store, EXPERIMENT)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (run,) = runs_in(store, EXPERIMENT)
    assert run.info.status in ("KILLED", "FAILED") and run.data.tags["training_gate"] == "open"
    artifacts = {file.path for file in MlflowClient(store).list_artifacts(run.info.run_id)}
    assert names.ARTIFACT_GATE in artifacts and names.ARTIFACT_TRACEBACK not in artifacts  # closed by us, as no crash


def test_mlflow_is_the_one_of_this_environment() -> None:
    """Otherwise the tests above would speak about another MLflow."""
    found = shutil.which("mlflow", path=environment(None)["PATH"])
    assert found and Path(found).parent == Path(environment(None)["PATH"].split(os.pathsep)[0])

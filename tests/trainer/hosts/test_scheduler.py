"""Ranks that a scheduler has made: from its variables to torch's; and the files for SLURM and Kubernetes."""

import subprocess
from pathlib import Path

import pytest
import yaml

from trainer.config.load import load
from trainer.hosts.hostfile import read
from trainer.hosts.scheduler import adopt, expanded

CLUSTER = Path(__file__).parents[3] / "docs" / "cluster"
SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NODELIST": "node[07-08]"}
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def told(environment: dict[str, str]) -> list[str] | None:
    """What torch is told of a rank; None where the process is none."""
    made = dict(environment)
    if not adopt(made):
        assert made == environment
        return None
    assert environment.items() <= made.items()  # nothing that was said is changed
    return [made[name] for name in TOLD]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ["9", "1", "16", "16", "node07", "29400"]),
        (
            SLURM | {"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
                     "SLURM_NODEID": "1"},
            ["9", "1", "16", "8", "node07", "24567"],
        ),
        (SLURM | {"SLURM_TASKS_PER_NODE": "10,6", "SLURM_NODEID": "1"}, ["9", "1", "16", "6", "node07", "29400"]),
        (
            SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242", "SLURM_NTASKS_PER_NODE": "8"},
            ["9", "1", "16", "8", "10.0.0.7", "4242"],
        ),
        (
            {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0.svc"},
            ["1", "0", "2", "1", "job-0.svc", "29400"],
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
            ["1", "0", "2", "1", "job-master-0", "23456"],
        ),
    ],
    ids=["SLURM", "a step of a job", "uneven hosts", "a meeting place that was named", "an Indexed Job", "PyTorchJob"],
)  # fmt: skip
def test_a_scheduler_makes_ranks(environment: dict[str, str], expected: list[str]) -> None:
    """The first host is where they meet, on a port that follows from the job."""
    assert told(environment) == expected


def test_ranks_of_torchs_launcher_are_left_as_they_are() -> None:
    """Also those that it has made inside of a job of a scheduler."""
    by_torch = dict(zip(TOLD, ["3", "1", "4", "2", "10.0.0.1", "29500"], strict=True))
    assert told(by_torch | SLURM) == list(by_torch.values())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_JOB_ID": "7"},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_NODELIST": "node[07-08]"},
        {"JOB_COMPLETION_INDEX": "1"},
    ],
    ids=["nothing", "the batch script", "one task", "a shell of salloc", "a pod that starts its ranks itself"],
)
def test_what_is_no_rank_stays_alone(environment: dict[str, str]) -> None:
    """A batch script has the variables of a rank, and is none: it starts them."""
    assert told(environment) is None


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,21]-ib,login", ["gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu21-ib", "login"]),
        ("x[1,3],y[2]", ["x1", "x3", "y2"]),
    ],
)
def test_lists_of_nodes_are_written_out_in_order(nodes: str, hosts: list[str]) -> None:
    """Leading zeros stay."""
    assert list(expanded(nodes)) == hosts


def test_the_slurm_script_starts_the_trainer_on_every_task(tmp_path: Path) -> None:
    """Its shell is right, and with a stand-in for srun the command is the README's, with all arguments."""
    script = CLUSTER / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "MLFLOW_TRACKING_URI": "x"}
    done = subprocess.run(
        ["bash", script, "last6_lora", "--seed", "18"], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == [
        *("--kill-on-bad-exit=1", "python", "-m", "trainer", "run"),
        *("last6_lora", "--seed", "18"),
    ]
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH --")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"] and {"nodes", "time", "requeue"} <= options.keys()


def test_the_kubernetes_job_names_as_many_hosts_as_it_makes(tmp_path: Path) -> None:
    """Service, file of hosts and Job belong together; its command is one that the trainer understands."""
    service, hosts, job = yaml.safe_load_all((CLUSTER / "job.yaml").read_text(encoding="utf-8"))
    assert [part["kind"] for part in (service, hosts, job)] == ["Service", "ConfigMap", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (tmp_path / "hosts").write_text(hosts["data"]["hosts"])
    listed = read(str(tmp_path / "hosts"))
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == len(listed)
    name, domain = job["metadata"]["name"], pod["subdomain"]
    assert domain == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert [host.name for host in listed] == [f"{name}-{index}.{domain}" for index in range(len(listed))]
    assert {host.slots for host in listed} == {container["resources"]["limits"]["nvidia.com/gpu"]}
    assert container["command"] == ["python", "-m", "trainer", "run"]
    config, *given = container["args"]
    keys = dict(argument.removeprefix("--").split("=") for argument in given if argument.startswith("--launch."))
    assert keys["launch.hosts"] == f"{container['volumeMounts'][0]['mountPath']}/hosts"
    keys["launch.hosts"] = str(tmp_path / "hosts")
    assert load(config, overrides=keys).config.launch.restarts > 0
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}

"""Ranks that a scheduler has made (SLURM, a Kubernetes Indexed Job), told in the variables of torch's launcher.

What torch needs of a rank are RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. torchrun and
`accelerate launch` set them all; others set their own, from which these follow.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping

_FIRST_PORT, _PORTS = 20000, 10000
"""Ports below those that the system gives away by itself; each SLURM job has its own of them."""
_PORT = "29400"
_BRACKETS = re.compile(r"([^,\[]*)\[([^\]]+)\]([^,\[]*)|([^,\[]+)")


def adopt(environment: MutableMapping[str, str]) -> bool:
    """Whether this process is a rank of several; its variables are completed where a scheduler has made it one.

    Args:
        environment: of this process.
    """
    for made_by in (_by_rank, _by_slurm, _by_kubernetes):
        if "LOCAL_RANK" not in environment:
            environment.update(made_by(environment))
    return "LOCAL_RANK" in environment


def _by_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """One rank a host, as Kubeflow's PyTorchJob says it: RANK, WORLD_SIZE and MASTER_ADDR alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return {}
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": environment.get("MASTER_PORT", _PORT)}


def _by_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """A task of `srun`: the first host of the job is where the ranks meet.

    The batch script itself is no rank, although it has the variables of one: it is in a job, and in no step.
    """
    if "SLURM_JOB_ID" in environment and not environment.get("SLURM_STEP_ID", "").isdecimal():
        return {}
    ranks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    rank, local = environment.get("SLURM_PROCID", ""), environment.get("SLURM_LOCALID", "")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    hosts = hosts or environment.get("SLURM_JOB_NODELIST", "")
    if not all(text.isdecimal() for text in (ranks, rank, local)) or int(ranks) < 2 or not hosts:
        return {}
    job = environment.get("SLURM_JOB_ID", "")
    port = _FIRST_PORT + int(job) % _PORTS if job.isdecimal() else int(_PORT)
    return {
        "RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": _tasks_here(environment, ranks),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or next(expanded(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }  # fmt: skip


def _tasks_here(environment: Mapping[str, str], ranks: str) -> str:
    """Tasks of this step on this host, from a list such as `4(x2),2` and the host's number."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [count] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        return counts[int(node)]
    each = environment.get("SLURM_NTASKS_PER_NODE", "")
    return each if each.isdecimal() else str(-(-int(ranks) // max(1, len(counts))))


def _by_kubernetes(environment: Mapping[str, str]) -> dict[str, str]:
    """A pod of an Indexed Job with one rank each: WORLD_SIZE and MASTER_ADDR stand in the manifest."""
    index = environment.get("JOB_COMPLETION_INDEX", "")
    if not index.isdecimal() or not {"WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return {}
    return {
        "RANK": index, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": environment.get("MASTER_PORT", _PORT)
    }  # fmt: skip


def expanded(nodes: str) -> Iterator[str]:
    """The hosts of a SLURM list, in order: `node[1-2,07],login` is node1, node2, node07 and login.

    Args:
        nodes: one pair of brackets a name at most.
    """
    for before, inside, after, plain in _BRACKETS.findall(nodes):
        if plain:
            yield plain
        for span in inside.split(",") if inside else ():
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield f"{before}{number:0{len(first)}d}{after}"

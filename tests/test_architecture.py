"""DESIGN's one-way flow and the sizes that keep it readable, held by the syntax trees of the source itself."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trainer", "analysis", "benchmarks")

# Module of the trainer -> the modules of the trainer that it may import. A pattern with * stands for several modules;
# the first that fits counts. What is not listed is the composition of the rest: run, build, facts, show and so on.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "names": (),
    "errors": (),
    "events": (),
    "config.*": ("config.*", "errors"),
    "strategy": ("config.schema", "errors"),
    "raw_strategy": ("config.problems", "strategy", "errors"),
    "architectures": ("errors",),
    "seeds": (),
    "attention": (),
    "model": ("architectures", "attention", "seeds", "strategy", "errors"),
    "gradient_checkpointing": ("model", "strategy"),
    "cache": (),
    "fused.choice": ("fused.*", "gradient_checkpointing", "model", "strategy"),
    "fused.*": ("fused.*", "cache"),
    "cost.*": ("cost.*", "strategy"),
    "earlier": ("config.resolved", "names", "runs", "spool"),
    "show_cost": ("cost.*", "estimate"),
    "collector": (),
    "launch": ("errors", "hosts.network", "hosts.scheduler", "signals"),
    "processes": ("config.schema", "hosts.elastic", "launch", "sync"),
    "hosts.agreement": ("config.*", "errors", "launch", "provenance", "runs"),
    "hosts.elastic": ("config.*", "errors", "hosts.*", "launch", "signals"),
    "hosts.rounds": ("hosts.*", "launch"),
    "hosts.*": ("errors", "hosts.*"),
    "gpus": ("attention", "config.*", "errors"),
    "stages": ("config.*", "errors", "optim", "strategy"),
    "curriculum": ("engine", "gate", "model", "stages"),
    "ranks": ("addresses", "config.*", "errors", "gpus", "hosts.hostfile", "launch", "names", "redact", "runs"),
    "engine": ("data.loader", "model"),
    "zero2": ("data.loader", "engine", "model"),
    "optim": ("model", "strategy", "errors"),
    "gate": ("model", "strategy", "errors"),
    "data.*": ("data.*", "config.schema", "errors", "seeds"),
    "convert": ("data.*", "errors"),
    "lettering": (),
    "labels": ("data.*", "lettering"),
    "sheet": ("data.*", "labels", "lettering"),
    "data_figure": ("data.*", "errors", "lettering", "validate"),
    "inference.stopping": (),
    "inference.repair": ("data.*",),
    "inference.recipe": ("checkpoint", "data.*", "errors", "model", "provenance"),
    "inference.image_files": ("data.*", "errors"),
    "inference.checkpoint_source": ("checkpoint", "errors", "stored"),
    "inference.predictor": ("checkpoint", "data.*", "errors", "generation", "inference.*", "model"),
    "inference.*": (
        "checkpoint",
        "collector",
        "data.*",
        "errors",
        "inference.*",
        "labels",
        "lettering",
        "model",
        "names",
        "options",
        "sheet",
        "stored",
    ),
    "stored": ("checkpoint", "errors", "names", "tracking"),
    "scoring": ("data.*",),
    "generation": ("data.*", "scoring"),
    "cadence": (),
    "halving": (),
    "loop": ("cadence", "data.loader", "engine", "events", "errors", "gate", "optim", "position", "seeds"),
    "durable": (),
    "checkpoint": ("durable", "events", "errors"),
    "resume": ("checkpoint", "engine", "events", "model", "position"),
    "position": ("events",),
    "runs": ("durable", "errors", "spool"),
    "compare.children": ("launch", "names", "runs", "signals", "spool"),
    "compare.jobs": ("compare.children", "errors", "gpus", "launch"),
    "compare.arms": ("config.*", "errors", "gpus", "launch"),
    "compare.asked": ("checkpoint", "compare.arms", "compare.jobs", "config.*", "runs"),
    "compare.parent": ("addresses", "begin", "errors", "names", "redact", "runs", "tracker", "tracking"),
    "compare.stage": ("compare.*", "names"),
    "compare.conclusion": ("compare.parent", "compare.stage", "names", "runs", "spool", "sync"),
    "sweep.space": (),
    "sweep.axes": ("config.*", "sweep.space"),
    "sweep.sweep_file": ("config.*", "errors", "names", "runs", "sweep.axes", "sweep.space"),
    "sweep.storage": ("addresses", "errors"),
    "sweep.study": ("errors", "sweep.space", "sweep.storage", "sweep.sweep_file"),
    "sweep.points": ("sweep.space", "sweep.study", "sweep.sweep_file"),
    "sweep.worker": (
        "compare.children",
        "compare.jobs",
        "errors",
        "names",
        "runs",
        "sweep.space",
        "sweep.storage",
        "sweep.study",
    ),
    "sweep.shared_run": ("addresses", "errors", "names", "redact", "spool", "tracking"),
    "signals": ("errors",),
    "redact": (),
    "spool": ("durable",),
    "delivery": ("errors", "spool"),
    "tracker": ("delivery", "errors", "names", "redact", "spool"),
    "metrics": ("events", "names"),
    "addresses": ("names", "errors", "redact"),
    "tracking": ("addresses", "names", "errors", "spool"),
    "sync": ("addresses", "delivery", "errors", "runs", "spool", "tracking"),
    "provenance": ("checkpoint", "model"),
    "display": ("events", "names"),
    "reporter": ("display", "events", "metrics", "names", "tracker"),
}

# Package from outside -> the only modules of the trainer that may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "mlflow": ("tracking", "stored", "inference.served"),  # what runs write; what they left; what MLflow serves
    "optuna": ("sweep.*",),
    "sqlalchemy": ("tracking", "sweep.storage"),
    "click": ("__main__", "options", "*_command", "data_commands"),
    "deepspeed": ("zero2",),
    "pyarrow": ("facts",),
    "psutil": ("hosts.network", "reporter", "signals"),
    "sklearn": ("data.digits",),
    "matplotlib": ("inference.drawn", "data.digits", "data_figure", "labels", "lettering", "preview", "sheet"),
    "pydantic": ("config.*",),
    "torchvision": (),
    "analysis": ("halving",),  # two functions of statistics, which import neither MLflow nor torch
    "tests": (),
}


def files(*packages: str) -> list[Path]:
    """Every Python file of some packages."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """`config.load` for `trainer/config/load.py`."""
    return ".".join(path.relative_to(ROOT / "trainer").with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {_imported(node.module, alias.name) for alias in node.names}
    return found


def _imported(module: str, name: str) -> str:
    """`from trainer import names` means trainer.names; `from trainer.names import X` means trainer.names too."""
    path = ROOT.joinpath(*module.split("."))
    return f"{module}.{name}" if (path / f"{name}.py").is_file() or (path / name).is_dir() else module


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


TRAINER = {module_name(path): path for path in files("trainer")}


def test_the_table_names_only_modules_that_exist() -> None:
    """A renamed module must not leave its rule behind."""
    for pattern in [*MAY_IMPORT, *(p for allowed in MAY_IMPORT.values() for p in allowed)]:
        assert any(fnmatchcase(name, pattern) for name in TRAINER), pattern


@pytest.mark.parametrize("module", TRAINER)
def test_imports_go_one_way(module: str) -> None:
    """A module imports only what DESIGN's table allows it."""
    rule = next((allowed for pattern, allowed in MAY_IMPORT.items() if fnmatchcase(module, pattern)), None)
    ours = {name.removeprefix("trainer.") for name in imports(TRAINER[module]) if name.split(".")[0] == "trainer"}
    if rule is not None:
        assert [name for name in ours if not fits(name, rule)] == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_from_outside_has_one_door(package: str) -> None:
    """MLflow behind tracking, the analysis behind the rule that needs its statistics; torchvision behind none."""
    users = {name for name, path in TRAINER.items() if package in {module.split(".")[0] for module in imports(path)}}
    assert {user for user in users if not fits(user, ONLY_IN[package])} == set()
    assert bool(users) == bool(ONLY_IN[package])


# Module of the analysis -> the modules of the analysis that it may import: MLflow at one end, text at the other.
ANALYSIS_MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "curves": (),
    "statistics": (),
    "margins": ("statistics",),
    "page": (),
    "runs": (),
    "store": ("curves", "runs"),
    "published": ("runs",),
    "tensorboard": ("curves", "runs"),
    "settings": ("runs",),
    "ranking": ("curves", "runs", "settings", "statistics"),
    "reading": ("comparison", "curves", "ranking", "runs", "settings", "store"),
    "comparison": ("curves", "ranking"),
    "ended_early": ("ranking", "runs"),
    "verdict": ("effects", "ended_early", "ranking", "statistics"),
    "subject": ("ranking", "runs", "settings"),
    "checks": ("subject",),
    "effects": ("ranking", "settings", "statistics"),
    "records": ("ranking", "statistics"),
    "advice": ("checks", "effects", "ended_early", "ranking", "runs", "settings", "statistics", "verdict"),
    "champion": ("ended_early", "ranking", "statistics", "store", "verdict"),
    "tables": ("checks", "effects", "page", "ranking", "statistics", "subject", "verdict"),
    "crossed": ("effects", "page", "settings", "statistics", "tables", "verdict"),
    "plots": ("comparison", "curves", "effects", "ranking", "settings", "statistics"),
    "reproduction": ("advice", "page", "ranking", "runs", "settings"),
    "sections": (
        "advice", "checks", "comparison", "crossed", "effects", "page", "ranking", "records", "reproduction",
        "settings", "subject", "tables", "verdict",
    ),
    "gallery": ("ranking", "store"),
    "gallery_page": ("gallery",),
    "report": (
        "advice", "checks", "comparison", "page", "plots", "ranking", "records", "sections", "store", "subject",
        "verdict",
    ),
    "__main__": (
        "champion", "comparison", "gallery", "gallery_page", "plots", "published", "ranking", "reading", "report",
        "store", "tables",
        "tensorboard",
    ),
}  # fmt: skip
"""Only `reading`, `champion`, `report` and the command line are handed the door to MLflow."""


def test_the_analysis_has_one_door_to_mlflow_and_imports_go_one_way() -> None:
    """Only the store imports it; statistics and curves know nothing of runs."""
    modules = {path.stem: imports(path) for path in files("analysis") if path.stem != "__init__"}
    assert set(modules) == set(ANALYSIS_MAY_IMPORT)
    for module, found in modules.items():
        assert {name.removeprefix("analysis.") for name in found if name.startswith("analysis.")} <= set(
            ANALYSIS_MAY_IMPORT[module]
        ), module
        for package, door in (("mlflow", "store"), ("matplotlib", "plots")):
            assert module == door or not any(name.split(".")[0] == package for name in found), module


def test_only_run_knows_both_the_loop_and_the_tracking() -> None:
    """The composition root is where they meet."""
    both = {"trainer.loop", "trainer.tracking"}
    assert {name for name, path in TRAINER.items() if both <= imports(path)} == {"run"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("strategy", "torch"),
        ("raw_strategy", "torch"),
        ("config.load", "torch"),
        ("names", "numpy"),
        ("metrics", "torch"),
        ("loop", "mlflow"),
        ("halving", "torch"),
        ("halving", "mlflow"),
        ("cost.memory", "torch"),
        ("cost.operations", "torch"),
        ("run", "mlflow"),  # of several ranks only the first has it imported
    ],
)
def test_importing_a_module_does_not_bring_in(module: str, unwanted: str) -> None:
    """Not by way of something else either."""
    script = f"import trainer.{module}, sys; assert {unwanted!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", files(*PACKAGES, "tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_its_job_and_is_not_a_drawer(path: Path) -> None:
    """A docstring, a name that says something, and a size that can be read in one sitting."""
    assert ast.get_docstring(tree(path)) or path.name == "__init__.py"
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (500 if path.is_relative_to(ROOT / "tests") else 400)


@pytest.mark.parametrize("path", files("trainer", "analysis"), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_checker_is_told_to_overlook_has_its_reason_beside_it(path: Path) -> None:
    """`noqa` and `type: ignore` name one rule each, and say why it does not hold there."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.search(r"# (noqa|type: ignore)", line):
            assert re.search(r"# (noqa: [A-Z]+\d+|type: ignore\[[a-z-]+\])  # \S", line), line


def test_functions_are_short() -> None:
    """None over 80 lines, nine of ten at most 40."""
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in files(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert [where for where, length in lengths.items() if length > 80] == []
    assert sum(length <= 40 for length in lengths.values()) >= 0.9 * len(lengths)


def test_one_run_is_followed_in_two_thousand_lines() -> None:
    """The path that the README gives for reading."""
    path = ("__main__", "run", "build", "strategy", "model", "optim", "gate", "loop", "tracking")
    assert sum(len(TRAINER[name].read_text(encoding="utf-8").splitlines()) for name in path) <= 2000
    assert len(TRAINER["run"].read_text(encoding="utf-8").splitlines()) <= 120


def test_strategies_are_data_not_branches() -> None:
    """No code asks for an experiment by its name."""
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"base"}
    for path in files("trainer", "analysis"):
        for node in ast.walk(tree(path)):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            parts += [node.value] if isinstance(node, ast.MatchValue) else []
            named = {c.value for part in parts for c in ast.walk(part) if isinstance(c, ast.Constant)} & experiments
            assert not named, f"{path}:{getattr(node, 'lineno', '?')}: {named}"


def test_the_loop_and_the_data_do_not_know_the_configuration() -> None:
    """They take the values they use; no argument or variable of theirs is called config."""
    for module, path in TRAINER.items():
        if module == "loop" or module.startswith("data."):
            names = {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name)}
            names |= {n.arg for n in ast.walk(tree(path)) if isinstance(n, ast.arg)}
            assert not names & {"config", "cfg"}, module


def test_a_step_of_the_loop_is_written_once() -> None:
    """One call each of evaluation and step in `fit`: the last pass is no copy of the others."""
    (fit,) = [n for n in tree(TRAINER["loop"]).body if isinstance(n, ast.FunctionDef) and n.name == "fit"]
    called = [n.func.id for n in ast.walk(fit) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert (called.count("evaluate_all"), called.count("train_step")) == (1, 1)

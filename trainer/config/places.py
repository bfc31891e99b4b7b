"""Where configuration files are found, and where relative paths inside them are looked for."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.config.problems import Problem, nearest, place, printable, shown
from trainer.config.zero import ZERO_NAMES
from trainer.errors import ConfigError

MODEL_SIZES = ("2b", "4b", "8b", "32b")
"""The public Qwen3-VL sizes that `model.model: random:SIZE` can build without weights."""

PATH_KEYS = (
    *("custom.train_jsonl", "custom.val_jsonl", "custom.ood_jsonl", "custom.taxonomy"),
    *("model.model", "deepspeed.config", "launch.hosts"),
)
"""Keys whose relative paths are looked for in several places."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_ENDING = ".yaml"


def experiments_dir() -> Path:
    """Return the folder of shipped experiment files: of the checkout, else of the installed package."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "experiments"
    return checkout if (checkout / "base.yaml").is_file() else package / "experiments"


def shown_path(path: Path) -> str:
    """Return how messages and origins name a file: from `experiments/`, else from the current directory, else whole.

    Args:
        path: an absolute path.
    """
    shipped, here = experiments_dir(), Path.cwd()
    if path.is_relative_to(shipped):
        return printable("experiments/" + path.relative_to(shipped).as_posix())
    if not path.is_relative_to(here):
        return printable(str(path))
    name = printable(path.relative_to(here).as_posix())
    return "./" + name if name.startswith("experiments/") else name  # never the name of a shipped file


def find_config(config: str | Path) -> Path:
    """Return the absolute path of a configuration that may be named without folder and ending.

    Args:
        config: a path, or the name of a file in the current directory or in `experiments/`.

    Raises:
        ConfigError: no such file; names the places tried and the nearest name.
    """
    folder = experiments_dir()
    tried = [base / (str(config) + ending) for base in (Path.cwd(), folder, folder.parent) for ending in ("", _ENDING)]
    names = [path.stem for base in (folder, Path.cwd()) for path in sorted(base.glob("*" + _ENDING))]
    return _first_file(tried, f"configuration {shown(str(config))}", Path(config).stem, names)


def find_profile(profile: str) -> Path:
    """Return the absolute path of a profile, by name or as a path to a YAML file.

    Args:
        profile: the name of a file in `experiments/profiles/`, or a path.

    Raises:
        ConfigError: no such file; names the places tried and the nearest name.
    """
    folder = experiments_dir() / "profiles"
    tried = [folder / (profile + _ENDING), *([Path.cwd() / profile] if profile.endswith(_ENDING) else [])]
    names = [*(path.stem for path in sorted(folder.glob("*" + _ENDING))), "none"]
    return _first_file(tried, f"profile {shown(profile)}", profile, names)


def find_sweep(sweep: str) -> Path:
    """Return the absolute path of a sweep's file, by name or as a path to a YAML file.

    Args:
        sweep: the name of a file in `experiments/sweeps/`, or a path.

    Raises:
        ConfigError: no such file; names the places tried and the nearest name.
    """
    folder = experiments_dir() / "sweeps"
    tried = [base / (sweep + ending) for base in (Path.cwd(), folder, folder.parent.parent) for ending in (_ENDING, "")]
    names = [path.stem for path in sorted(folder.glob("*" + _ENDING))]
    return _first_file(tried, f"sweep {shown(sweep)}", Path(sweep).stem, names)


def _first_file(tried: Sequence[Path], what: str, name: str, names: Sequence[str]) -> Path:
    """Return the first path that is a file, or raise what tells every place and name."""
    for path in tried:
        if _is_file(path):
            return path.resolve()
    guess = nearest(name, names)
    do = f"did you mean {guess}?" if guess else "name one of these, or the path of a YAML file"
    places = _listed(dict.fromkeys(tried))
    raise ConfigError(what, f"no such file; tried {places}", ", ".join(dict.fromkeys(names)) or "a YAML file", do)


def find_extended(name: object, child: Path, where: str) -> Path:
    """Return the absolute path of the file that another one extends.

    Args:
        name: the value of `extends`.
        child: the file that says it.
        where: file and line that say it.

    Raises:
        ConfigError: not one file name, or no such file.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(where, f"extends: {shown(name)}", "one file name, relative to this file", "name one file")
    path = child.parent / name
    if not _is_file(path):
        guess = nearest(name, [p.name for p in sorted(child.parent.glob("*" + _ENDING)) if p != child])
        do = f"did you mean {guess}?" if guess else "correct the name"
        raise ConfigError(where, f"extends: {shown(name)}", f"a file; tried {_listed([path])}", do)
    return path.resolve()


def resolve(key: str, value: str, folder: Path, where: str) -> str | Problem:
    """Return a path value as an absolute path, a model's name unchanged, or what is wrong with it.

    Args:
        key: one of `PATH_KEYS`.
        value: what was written.
        folder: folder of the file that holds the value.
        where: that file and line, or `-P`.
    """
    try:
        given = Path(value).expanduser()
    except (RuntimeError, ValueError):  # ~somebody that this machine does not know, or half a letter of a name
        given = Path(value)
    tried = list(dict.fromkeys(base / given for base in (Path.cwd(), folder, folder.parent)))
    if key == "model.model":
        return _resolve_model(value, tried, where)
    if key == "deepspeed.config" and value in ZERO_NAMES:
        return value
    for path in tried:
        if _is_file(path):
            return str(path.resolve())
    allowed, do = f"a file; tried {_listed(tried)}", "correct the path"
    if key == "deepspeed.config":
        guess = nearest(value, ZERO_NAMES)
        allowed, do = f"{', '.join(ZERO_NAMES)}, or {allowed}", f"did you mean {guess}?" if guess else do
    return Problem(place(where, key), f"{shown(value)}: no such file", allowed, do)


def _resolve_model(value: str, tried: Sequence[Path], where: str) -> str | Problem:
    """Return a base model's folder as an absolute path, and its other forms as they are."""
    sizes = [f"random:{size}" for size in MODEL_SIZES]
    if value.lower() in ("", "pocket", *sizes):  # the schema refuses the empty one
        return value.lower()
    for path in tried:
        if _is_folder(path):
            return str(path.resolve())
    if _HUB_ID.fullmatch(value):
        return value
    guess = nearest(value, ["pocket", *sizes])
    return Problem(
        place(where, "model.model"),
        f"{shown(value)}: no such model",
        f"pocket, {', '.join(sizes)}, a hub id org/name, or a folder; tried {_listed(tried)}",
        f"did you mean {guess}?" if guess else "correct the path",
    )


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(printable(str(path)[:300]) for path in paths)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False

"""The compiled kernels: built once a machine, whoever starts at the same time; done without where they cannot be."""

import multiprocessing
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.fused import native
from trainer.fused.functions import swiglu

Compiler = Callable[[str], Path]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was built yet; returns where files land."""
    for variable in ("CXX", "VTE_NATIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # each test asks anew; what the process has loaded stays with its other tests
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    return tmp_path / "cache" / "vision-tower-experiments" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Makes a shell script the compiler."""

    def make(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


def works() -> bool:
    """An operation is right, whichever way it is made; returns whether that was by the kernels."""
    rows = torch.randn(3, 40)
    expected = torch.nn.functional.silu(rows[:, :20]) * rows[:, 20:]
    torch.testing.assert_close(swiglu(rows), expected, rtol=1e-5, atol=1e-6)
    return native.usable(rows)


def built_elsewhere() -> None:
    """What a rank that starts does: ends with 0 where there are kernels."""
    sys.exit(native.library() is None)


def test_they_are_built_once(machine: Path) -> None:
    """One file; a second look loads it as it is, and needs no compiler to have changed nothing."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    (built,) = machine.iterdir()
    before = built.stat().st_mtime_ns
    assert works() and [path.stat().st_mtime_ns for path in machine.iterdir()] == [before]


def test_a_zero_in_the_environment_turns_them_off(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""
    monkeypatch.setenv("VTE_NATIVE", "0")
    assert native.library() is None and not works() and not machine.exists()


def test_without_a_compiler_torch_computes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no program is none."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.library() is None and not works()


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\nexit 1\n",
        "#!/bin/sh\nkill -9 $$\n",
        # says that it has compiled, and has written nothing, or nonsense
        "#!/bin/sh\nexit 0\n",
        '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done\n',
        # no program at all: the system cannot start it
        "\x7fELF nonsense",
    ],
    ids=["fails", "is killed", "writes nothing", "writes nonsense", "cannot be started"],
)
def test_with_a_broken_compiler_torch_computes(script: str, compiler: Compiler) -> None:
    """No traceback, and the right numbers."""
    compiler(script)
    assert native.library() is None and not works()


def test_a_compiler_without_openmp_is_enough(compiler: Compiler) -> None:
    """Kernels on one thread are better than none."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    compiler('#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec c++ "$@"\n')
    assert works()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be: even an administrator cannot write below it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.library() is None and not works()


def test_a_damaged_file_in_the_cache_is_built_again(machine: Path) -> None:
    """Such as a disk that was full leaves behind."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    machine.mkdir(parents=True)
    (machine / f"{native._fingerprint(['c++'])}.so").write_bytes(b"\x7fELF")
    assert native.library() is not None and works()


def test_a_compiler_may_have_arguments(machine: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CXX="ccache c++"`."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    path = compiler('#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("CXX", f"{path} c++")
    assert native.library() is not None and works()


def test_two_processes_that_build_at_once_both_get_them(machine: Path) -> None:
    """Each puts a whole file there in one step; nothing else stays behind."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=built_elsewhere) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    (built,) = machine.iterdir()
    assert built.suffix == ".so"


def test_other_sources_flags_and_compilers_are_other_files(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built from something else is never loaded."""
    path = compiler("#!/bin/sh\necho version 1\n")
    found = [native._fingerprint([str(path)])]
    assert native._fingerprint([str(path)]) == found[0]
    source = tmp_path / "kernels.cpp"
    source.write_bytes(native._SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "_SOURCE", source)
    found.append(native._fingerprint([str(path)]))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    found.append(native._fingerprint([str(path)]))
    compiler("#!/bin/sh\necho version 2\n")
    found.append(native._fingerprint([str(path)]))
    processor = tmp_path / "cpuinfo"
    processor.write_text("model name : another\n")
    monkeypatch.setattr(native, "Path", lambda _: processor)
    found.append(native._fingerprint([str(path)]))
    assert len(set(found)) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_theirs(dtype: torch.dtype) -> None:
    """Whatever else goes to torch's operations."""
    assert not native.usable(torch.ones(2), torch.ones(2, dtype=dtype))

"""Real servers for tests: a PostgreSQL cluster, and the MLflow server for a team that docs/server.md sets up."""

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.running import environment, mlflow_process
from tests.server_process import ServerProcess, free_port, started

PAGE = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")


def documented(part: str) -> str:
    """The code block of docs/server.md that holds a text, and only one does; with what it holds, without its indent."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)
    (block,) = [block for block in blocks if part in block]
    return re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n"


def postgres_binaries() -> Path:
    """The folder of PostgreSQL's programs; the test is skipped where there is none."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    for folder in reversed(folders):
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    pytest.skip("PostgreSQL is not installed: no initdb on PATH, nor in /usr/lib/postgresql/*/bin")


def _user_for_postgres() -> str | None:
    """Whom PostgreSQL runs as: us, unless we are root, which it refuses."""
    if os.getuid() != 0:
        return None
    if "postgres" not in (entry.pw_name for entry in pwd.getpwall()):
        pytest.skip("PostgreSQL does not run as root, and this machine has no user `postgres`")
    return "postgres"


def _run(command: list[str], folder: Path, user: str | None, given: str = "", **variables: str) -> None:
    """Run a program as a user, with its standard input and without a terminal to ask for passwords."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", **variables},
        input=given,
        capture_output=True,
        text=True,
        timeout=240,
        user=user,
        group=pwd.getpwnam(user).pw_gid if user else None,
        extra_groups=[] if user else None,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def postgres(folder: Path, *, durable: bool = False) -> Iterator[str]:
    """A real PostgreSQL cluster with what docs/server.md creates in it: user `mlflow`, its databases.

    It listens on 127.0.0.1 alone, without a socket file, and asks everybody for a password. Its files lie outside of
    `folder`, because it refuses to run as root and may not enter root's folders as somebody else.

    Args:
        folder: keeps its log.
        durable: wait for the disk at each commit; needless where processes are killed and the machine is not.

    Yields:
        The URI of database `mlflow`, with user and password.
    """
    binaries, port = postgres_binaries(), free_port()
    password = os.urandom(12).hex()
    user = _user_for_postgres()
    home = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        (home / "password").write_text(password)
        if user:
            shutil.chown(home, user)
            shutil.chown(home / "password", user)
        initdb = [str(binaries / "initdb"), "-D", "data", "-U", "postgres", "--auth=scram-sha-256", "--no-sync"]
        _run([*initdb, "--encoding=UTF8", "--no-locale", "--pwfile=password"], home, user)
        options = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": ""}
        if not durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        command = [str(binaries / "postgres"), "-D", str(home / "data")]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        asked = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        server = ServerProcess(
            command,
            folder,
            port,
            {"LC_ALL": "C"},
            user,
            ready=lambda: subprocess.run(asked).returncode == 0,
            stop_signal=signal.SIGQUIT,  # "immediate" to PostgreSQL: it takes the processes of its sessions with it
        )
        with started(server):
            _run(
                ["bash", "-ec", documented("createdb")],
                home,
                user,
                f"{password}\n{password}\n",
                PATH=f"{binaries}:{os.environ['PATH']}",
                PGHOST="127.0.0.1",
                PGPORT=str(port),
                PGUSER="postgres",
                PGPASSWORD=password,
            )
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow"
    finally:
        shutil.rmtree(home, ignore_errors=True)


def secrets(folder: Path) -> dict[str, str]:
    """What server.env of a documented server holds."""
    lines = (folder / "server.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def _team_server(folder: Path, backend_uri: str, port: int | None) -> ServerProcess:
    """The server of docs/server.md with its files in `folder`; on the page's database and port stand others here."""
    port, database = port or free_port(), urlsplit(backend_uri)
    assert database.password, "a database with a login, as `postgres` makes it"

    def here(text: str) -> str:
        return text.replace("127.0.0.1:5432", f"127.0.0.1:{database.port}").replace("--port 5000", f"--port {port}")

    if not (folder / "server.env").exists():
        _run(["bash", "-ec", documented("> server.env")], folder, None, f"{database.password}\n")
    (folder / "basic_auth.ini").write_text(here(documented("default_permission")), encoding="utf-8")
    command = shlex.split(here(documented("--app-name basic-auth")).replace("\\\n", " "))
    server = ServerProcess(command, folder, port, environment(None))
    server.ready = lambda: _is_healthy(server.uri)
    return server


def _is_healthy(uri: str) -> bool:
    """Whether the MLflow server answers: its port is open before its workers are there."""
    try:
        return bool(requests.get(f"{uri}/health", timeout=10).ok)
    except requests.RequestException:
        return False


@contextmanager
def tracking_server(folder: Path, backend_uri: str, *, auth: bool, port: int | None = None) -> Iterator[ServerProcess]:
    """A real `mlflow server`, artifacts in `folder`: to be killed and started again on the same port.

    Args:
        folder: its files and its log.
        backend_uri: the database of runs; with `auth` one that `postgres` has made.
        auth: set it up as docs/server.md says, with logins; else without, and with one worker.
        port: where it listens; unset: a free one.
    """
    server = _team_server(folder, backend_uri, port) if auth else mlflow_process(folder, backend_uri, port)
    with started(server):
        yield server

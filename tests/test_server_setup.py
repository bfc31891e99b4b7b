"""The server for a team, set up by the commands of docs/server.md: who gets in, who may what, and a run through it."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from tests.running import ROOT, SMALL, environment, flags, trainer
from tests.server_process import ServerProcess, free_port, listens, started
from tests.servers import documented, postgres, postgres_binaries, secrets, tracking_server
from trainer import names

ADMIN = "MLFLOW_AUTH_ADMIN_PASSWORD"  # in server.env
PASSWORDS = {user: f"{user}-has-a-password" for user in ("ann", "bob", "eve", "zoe")}

# What an owner may do to an experiment, and to a run with an artifact in it; a child process of each user tries it.
CHANGES = {
    "delete experiment": "client.delete_experiment(experiment)",
    "rename experiment": "client.rename_experiment(experiment, name + ' of mine')",
    "tag experiment": "client.set_experiment_tag(experiment, 'mine', 'yes')",
    "create run": "client.create_run(experiment)",
    "log metric": "client.log_metric(run, 'loss', 9.0)",
    "log batch": "client.log_batch(run, metrics=[Metric('loss', 9.0, 1, 1)])",
    "set tag": "client.set_tag(run, 'mine', 'yes')",
    "end run": "client.update_run(run, 'FAILED')",
    "add artifact": "client.log_text(run, 'mine', 'another.txt')",
    "overwrite artifact": "client.log_text(run, 'mine', 'told.txt')",
    "delete run": "client.delete_run(run)",
}
TRY = """
import json, sys
from mlflow import MlflowClient
from mlflow.entities import Metric
name, changes = sys.argv[1], json.loads(sys.argv[2])
client = MlflowClient()
experiment = client.get_experiment_by_name(name).experiment_id
(run, *_) = [run.info.run_id for run in client.search_runs([experiment], order_by=["attribute.start_time"])]
with open(client.download_artifacts(run, "told.txt")) as file:
    told = {"read": file.read()}
for what, code in changes.items():
    try:
        eval(code)
        told[what] = "done"
    except Exception as error:
        told[what] = "refused" if "403" in str(error) else repr(error)
print(json.dumps(told))
"""
CREATE = """
import sys
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment(sys.argv[1]))
client.log_metric(run.info.run_id, "loss", 1.0)
client.log_text(run.info.run_id, "what ann has to tell", "told.txt")
"""


@dataclass(frozen=True)
class Team:
    """The server, its folder and database, and the secrets that were made with it."""

    server: ServerProcess
    folder: Path
    database: str
    secrets: dict[str, str]

    def login(self, user: str) -> dict[str, str]:
        """The variables that log a user in."""
        password = self.secrets[ADMIN] if user == "admin" else PASSWORDS[user]
        return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}

    def run(self, user: str, command: list[str], given: str = "") -> str:
        """What a program writes that a user runs, without a terminal to ask for passwords."""
        variables = environment(self.server.uri, **self.login(user), MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
        done = subprocess.run(
            command, env=variables, input=given, capture_output=True, text=True, start_new_session=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def documented(self, user: str, part: str, given: str) -> str:
        """A command of the page, run by a user who types `given`, with this server and the experiment `together`."""
        command = documented(part).replace("http://127.0.0.1:5000", self.server.uri)
        return self.run(user, ["bash", "-ec", command.replace(names.EXPERIMENT, "together")], given)

    def try_all(self, user: str, name: str, changes: dict[str, str] = CHANGES) -> dict[str, Any]:
        """What becomes of a user's attempts on an experiment."""
        told = self.run(user, [sys.executable, "-c", TRY, name, json.dumps(changes)])
        answers: dict[str, Any] = json.loads(told.splitlines()[-1])
        return answers

    def status(self, path: str, user: str = "", password: str = "", method: str = "GET", **headers: str) -> int:
        """The HTTP status of one request."""
        auth = (user, password) if user else None
        answer = requests.request(method, f"{self.server.uri}{path}", auth=auth, headers=headers, timeout=120)
        return answer.status_code


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """PostgreSQL, the server, an account for each of `PASSWORDS`: the first made with the command of the page."""
    folder = tmp_path_factory.mktemp("team")
    with (
        postgres(tmp_path_factory.mktemp("postgres")) as database,
        tracking_server(folder, database, auth=True) as server,
    ):
        team = Team(server, folder, database, secrets(folder))
        team.documented("admin", "create_user", f"ann\n{PASSWORDS['ann']}\n")
        for user in set(PASSWORDS) - {"ann"}:
            account = {"username": user, "password": PASSWORDS[user]}
            address, login = f"{server.uri}/api/2.0/mlflow/users/create", ("admin", team.secrets[ADMIN])
            requests.post(address, json=account, auth=login, timeout=120).raise_for_status()
        yield team


@pytest.fixture(scope="module")
def shared(team: Team) -> str:
    """Ann's experiment with a run and an artifact."""
    team.run("ann", [sys.executable, "-c", CREATE, "shared"])
    return "shared"


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=9"
PAGES = ["/", "/signup", "/docs", "/openapi.json", "/graphql", "/version", "/metrics", "/v1/traces", SEARCH]
PAGES += ["/ajax-api/2.0/mlflow/experiments/search?max_results=9", "/api/2.0/mlflow/users/current"]
PAGES += ["/api/2.0/mlflow-artifacts/artifacts", "/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/told.txt"]
PAGES += ["/get-artifact?path=told.txt&run_uuid=x", "/model-versions/get-artifact?name=m&version=1&path=told.txt"]


@pytest.mark.parametrize("path", PAGES)
def test_nobody_gets_in_without_the_right_login(team: Team, path: str) -> None:
    """No login, an unknown user, a wrong password, and the password that MLflow once shipped: REST, artifacts, UI."""
    assert team.status(path) == 401
    assert team.status(path, "ann", "a-wrong-password") == 401
    assert team.status(path, "mallory", PASSWORDS["ann"]) == 401
    assert team.status(path, "admin", "password1234") == 401
    assert team.status(path, "ann", PASSWORDS["ann"]) != 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/2.0/mlflow/experiments/create"),
        ("POST", "/api/2.0/mlflow/users/create"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/told.txt"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1/x/artifacts/told.txt"),
    ],
)
def test_nobody_writes_without_the_right_login(team: Team, method: str, path: str) -> None:
    """The same for what changes something."""
    assert team.status(path, method=method) == 401
    assert team.status(path, "ann", "a-wrong-password", method) == 401


def test_what_is_open_to_everybody_tells_nothing_of_runs(team: Team, shared: str) -> None:
    """The page names all of it."""
    for path in ("/health", "/api/3.0/mlflow/server-info", "/static-files/index.html"):
        answer = requests.get(f"{team.server.uri}{path}", timeout=120)
        assert answer.status_code == 200
        assert shared not in answer.text and path.replace("index.html", "") in answer.url
    assert "the UI's own scripts" in (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def test_only_the_administrator_makes_accounts(team: Team) -> None:
    """Neither through the API nor through the page for signing up."""
    for path in ("/signup", "/api/2.0/mlflow/users/list"):
        assert team.status(path, "admin", team.secrets[ADMIN]) == 200
    assert team.status("/signup", "bob", PASSWORDS["bob"]) == 403
    for path in ("/api/2.0/mlflow/users/create", "/api/2.0/mlflow/users/create-ui"):
        assert team.status(path, "bob", PASSWORDS["bob"], "POST") == 403


def test_everything_listens_on_this_machine_only(team: Team) -> None:
    """The processes of server and database have no other port."""
    listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid]
    ours = {team.server.pid, *(child.pid for child in psutil.Process(team.server.pid).children(recursive=True))}
    of_server = {(c.laddr.ip, c.laddr.port) for c in listening if c.pid in ours}
    port = urlsplit(team.database).port
    of_database = {(c.laddr.ip, c.laddr.port) for c in listening if c.laddr.port == port}
    assert of_server == {("127.0.0.1", team.server.port)}
    assert of_database == {("127.0.0.1", port)}


def test_no_secret_stands_in_a_command_line_or_in_a_file_that_others_can_read(team: Team) -> None:
    """Every process of the machine is looked at, and every file in the server's folder."""
    hidden = [value for key, value in team.secrets.items() if "PASSWORD" in key or "SECRET" in key]
    assert len(hidden) == 3
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any("--app-name basic-auth" in line for line in lines)
    assert not [line for line in lines if any(secret in line for secret in hidden)]
    for path in (path for path in team.folder.rglob("*") if path.is_file()):
        if any(secret in path.read_text(errors="replace") for secret in hidden):
            assert (path.name, path.stat().st_mode & 0o777) == ("server.env", 0o600)
    assert (team.folder / "artifacts").stat().st_mode & 0o777 == 0o700


def test_others_see_an_experiment_and_can_change_nothing_of_it(team: Team, shared: str) -> None:
    """Bob tries all that an owner may do; Ann's run is as it was."""
    answers = team.try_all("bob", shared)
    assert answers == {"read": "what ann has to tell"} | dict.fromkeys(CHANGES, "refused")
    look = {"loss": "told.update(loss=client.get_metric_history(run, 'loss')[-1].value)"}
    look["runs"] = "told.update(runs=len(client.search_runs([experiment])))"
    look["files"] = "told.update(files=[file.path for file in client.list_artifacts(run)])"
    after = team.try_all("ann", shared, {f"{key} seen": code for key, code in look.items()})
    assert (after["read"], after["loss"], after["runs"], after["files"]) == (
        "what ann has to tell",
        1.0,
        1,
        ["told.txt"],
    )


def test_whom_the_owner_lets_in_can_log_and_not_delete(team: Team) -> None:
    """The command of the page, on another experiment than the one that it names; Bob stays out."""
    team.run("ann", [sys.executable, "-c", CREATE, "together"])
    team.documented("ann", "grant_user_permission", "eve\n")
    keep_name = {"rename experiment": "client.rename_experiment(experiment, name)"}
    answers = team.try_all("eve", "together", CHANGES | keep_name)
    assert {what for what, answer in answers.items() if answer == "refused"} == {"delete experiment", "delete run"}
    assert {answer for what, answer in answers.items() if what != "read"} == {"refused", "done"}
    assert set(team.try_all("bob", "together").values()) == {"mine", "refused"}


def test_an_owner_may_do_everything(team: Team) -> None:
    """What is refused to others is possible at all: otherwise the tests above would show nothing."""
    team.run("ann", [sys.executable, "-c", CREATE, "short-lived"])
    last = {"delete run": CHANGES["delete run"], "delete experiment": CHANGES["delete experiment"]}
    ordered = {what: code for what, code in CHANGES.items() if what not in last} | last
    assert set(team.try_all("ann", "short-lived", ordered).values()) == {"what ann has to tell", "done"}


def test_users_change_their_own_password(team: Team) -> None:
    """With the command of the page, and only who knows the old one."""
    team.documented("zoe", "current_password", f"zoe\n{PASSWORDS['zoe']}\nanother-password\n")
    assert team.status(SEARCH, "zoe", "another-password") == 200
    change = {"username": "zoe", "password": "a-third-password", "current_password": "a-wrong-password"}
    address = f"{team.server.uri}/api/2.0/mlflow/users/update-password"
    assert not requests.patch(address, json=change, auth=("zoe", "another-password"), timeout=120).ok
    assert requests.patch(address, json=change, auth=("bob", PASSWORDS["bob"]), timeout=120).status_code == 403
    assert team.status(SEARCH, "zoe", "a-third-password") == 401


def test_other_hosts_and_origins_are_refused(team: Team) -> None:
    """By default: a page of another site, and a name that leads here, get nothing."""
    login = ("ann", PASSWORDS["ann"])
    assert team.status(SEARCH, *login, Host="localhost:5000") == 200  # through `ssh -L`
    assert team.status(SEARCH, *login, Host="mlflow.example.org") == 403
    create = "/api/2.0/mlflow/experiments/create"
    assert team.status(create, *login, "POST", Origin="https://mlflow.example.org") == 403


def test_behind_a_reverse_proxy_its_name_alone_is_answered(team: Team) -> None:
    """The two options of the page, beside the others."""
    port = free_port()
    command = [str(port) if part == str(team.server.port) else part for part in team.server.command]
    command += shlex.split(documented("--allowed-hosts"))
    with started(replace(team.server, command=command, port=port, ready=None, _process=None)) as server:
        proxied = replace(team, server=server)
        login = ("ann", PASSWORDS["ann"])
        assert proxied.status(SEARCH, *login, Host="mlflow.example.org") == 200
        for refused in (f"127.0.0.1:{port}", "mlflow.example.org:443", "evil.example.org"):
            assert proxied.status(SEARCH, *login, Host=refused) == 403
        search = ("/ajax-api/2.0/mlflow/runs/search", *login, "POST")
        assert proxied.status(*search, Host="mlflow.example.org", Origin="https://evil.example.org") == 403
        assert proxied.status(*search, Host="mlflow.example.org", Origin="https://mlflow.example.org") != 403


def test_a_killed_server_comes_back_on_its_port_with_all_it_had(team: Team, shared: str) -> None:
    """Without the administrator's password this time, which was needed once."""
    file = team.folder / "server.env"
    before, port = file.read_text(encoding="utf-8"), team.server.port
    team.server.kill()
    assert not listens(port)
    kept = [line for line in before.splitlines() if not line.startswith(f"{ADMIN}=")]
    file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    team.server.start()
    file.write_text(before, encoding="utf-8")
    assert team.server.port == port
    assert team.try_all("bob", shared, {}) == {"read": "what ann has to tell"}
    assert team.status(SEARCH, "admin", team.secrets[ADMIN]) == 200


def test_a_backup_can_be_restored_and_the_databases_updated(team: Team, shared: str) -> None:
    """The dumps and the archive that the page makes; its update, which has nothing to do here, leaves them usable."""
    address = team.database.replace("+psycopg2", "").removesuffix("/mlflow")
    variables = environment(None, PATH=f"{postgres_binaries()}:{Path(sys.executable).parent}:{os.environ['PATH']}")

    def shell(command: str) -> str:
        command = command.replace("127.0.0.1:5432", f"127.0.0.1:{urlsplit(address).port}")
        done = subprocess.run(["bash", "-ec", command], cwd=team.folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shell(documented("pg_dump"))
    administrator = address.replace("//mlflow:", "//postgres:")
    shell(f"createdb --maintenance-db {administrator}/postgres --owner mlflow restored")
    shell(f"pg_restore --dbname={address}/restored mlflow.dump")
    query = "-tA -c 'select count(*) from metrics'"
    rows = shell(f"psql {address}/restored {query}")
    assert int(rows) > 0 and rows == shell(f"psql {address}/mlflow {query}")
    assert "/told.txt" in shell("tar -tzf artifacts.tar.gz")
    assert "admin" in shell("pg_restore --data-only --table=users --file=- mlflow_users.dump")
    shell(documented("db upgrade"))
    assert team.try_all("ann", shared, {}) == {"read": "what ann has to tell"}


def test_a_training_run_is_logged_through_the_server(team: Team, tmp_path: Path) -> None:
    """By Ann, who logs in with the file that the page describes; all of it is there, and hers."""
    (tmp_path / ".mlflow").mkdir()
    login = documented("mlflow_tracking_username").replace("your password", PASSWORDS["ann"])
    (tmp_path / ".mlflow" / "credentials").write_text(login, encoding="utf-8")
    done = trainer("run", "last6_lora", *flags(SMALL), cwd=tmp_path, store=team.server.uri, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    look = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
experiment = client.get_experiment_by_name(sys.argv[1])
(run,) = client.search_runs([experiment.experiment_id])
files = [file.path for file in client.list_artifacts(run.info.run_id)]
print(json.dumps([run.info.status, run.data.tags, run.data.metrics, files]))
"""
    status, tags, metrics, files = json.loads(team.run("bob", [sys.executable, "-c", look, names.EXPERIMENT]))
    assert (status, tags[names.TAG_GATE]) == ("FINISHED", "passed")
    assert {names.TRAIN_LOSS, names.EVAL_LOSS} <= set(metrics)
    assert {names.ARTIFACT_GATE, names.ARTIFACT_PREVIEW} <= set(files)
    assert PASSWORDS["ann"] not in done.stdout + done.stderr + json.dumps(tags)


def test_what_the_server_needs_is_pinned_alike_everywhere() -> None:
    """In the extra, among what tests need, and on the page, with the MLflow that the project has."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = pyproject["project"]["optional-dependencies"]["server"]
    assert set(extra) <= set(pyproject["dependency-groups"]["dev"])
    mlflow = [pin for pin in pyproject["project"]["dependencies"] if pin.startswith("mlflow==")]
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    (install,) = [line.strip() for line in page.splitlines() if line.startswith("    pip install")]
    assert shlex.split(install)[2:] == mlflow + extra

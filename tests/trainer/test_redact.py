"""Secrets reach nothing that is written: they are known by the names of variables, by their shape and in addresses."""

import io
import json
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from tests.running import SMALL, empty_store, flags, runs_in, trainer
from trainer.addresses import tracking_uri, without_password
from trainer.errors import TrackingError
from trainer.redact import HIDDEN, RedactedStream, Redactor

# --- what is known to be secret ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
        "MY_API_KEY", "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "BASIC_AUTH", "client_secret",
        "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "SIGNING_KEY", "GIT_CREDENTIALS", "SSH_PASSPHRASE",
    ],
)  # fmt: skip
def test_a_variable_is_secret_by_its_name(name: str) -> None:
    """Its value is hidden wherever it stands."""
    assert Redactor({name: "abc-9f8e7d"}).text("/data/abc-9f8e7d/x (abc-9f8e7d)") == f"/data/{HIDDEN}/x ({HIDDEN})"


@pytest.mark.parametrize(
    "name", ["PATH", "TOKENIZERS_PARALLELISM", "AUTHOR", "KEYBOARD", "COMPASS", "CACHE_KEY", "PATTERN"]
)
def test_other_variables_are_not(name: str) -> None:
    """Their values are words that texts are made of."""
    assert Redactor({name: "last6_lora"}).text("last6_lora") == "last6_lora"


@pytest.mark.parametrize("value", ["", "abc", "12345678", "mlflow", "postgres"])
def test_what_would_occur_by_chance_hides_nothing(value: str) -> None:
    """A password that is short, a number or the name of the server would make texts unreadable."""
    text = "mlflow 12345678 abc postgres"
    assert Redactor({"DB_PASSWORD": value}).text(text) == text


def test_a_variable_that_names_a_file_is_not_secret_but_one_that_is_called_like_a_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a key file may be told; a folder may bear a token as its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key.json").touch()
    (tmp_path / "t0k3n-9f8e").mkdir()
    redactor = Redactor({"GOOGLE_CREDENTIALS": f"{tmp_path}/key.json", "HF_TOKEN": "t0k3n-9f8e"})
    assert redactor.text(f"{tmp_path}/key.json") == f"{tmp_path}/key.json"
    assert redactor.text("data/t0k3n-9f8e/x") == f"data/{HIDDEN}/x"


@pytest.mark.parametrize("secret", ["p@ss/w:rd-1", 'quo"te\\d-1', "plain-secret-1"])
def test_a_secret_is_found_in_every_spelling(secret: str) -> None:
    """In an address, in JSON, after a line end that its variable has and nobody else."""
    redactor = Redactor({"MY_API_KEY": secret + "\n"})
    for text in (secret, quote(secret, safe=""), json.dumps({"key": secret}), f"http://me:{quote(secret)}@host/"):
        hidden = redactor.text(f"before {text} after")
        assert secret not in hidden and quote(secret, safe="") not in hidden and json.dumps(secret)[1:-1] not in hidden
        assert hidden.startswith("before ") and hidden.endswith(" after")


def test_the_longest_secret_counts() -> None:
    """One may be a part of another; nothing of either is left."""
    assert Redactor({"A_TOKEN": "secret1", "B_TOKEN": "secret1-and-more"}).text("secret1-and-more") == HIDDEN


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:hush@db/x", "postgresql://***@db/x"),
        ("postgresql://me:hu@sh@db/x", "postgresql://***@db/x"),
        ("postgresql://me:hu/sh@db/x", "postgresql://***@db/x"),
        ("https://ghp_short@github.com/a/b", "https://***@github.com/a/b"),
        ("see 'http://me:hush@host:5000/a'.", "see 'http://***@host:5000/a'."),
        ("http://host/a?token=hush&b=1", "http://host/a?token=***&b=1"),
        (
            "https://s3/x?X-Amz-Signature=hush&X-Amz-Credential=hush",
            "https://s3/x?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("http://host:5000/#/runs/a and me@home", "http://host:5000/#/runs/a and me@home"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
    ],
)
def test_addresses_lose_user_and_password_and_nothing_else(address: str, shown: str) -> None:
    """Whether or not a variable holds the password."""
    assert Redactor({}).text(address) == shown


@pytest.mark.parametrize("uri", ["postgresql://me:hu/sh@db/x", "postgresql://me:hush@db/x", "https://me:hush@host/x"])
def test_of_a_store_only_the_place_is_shown(uri: str) -> None:
    """Whatever the password is made of."""
    assert without_password(uri) == uri[: uri.index("me:")] + uri[uri.index("@") + 1 :]


def test_what_is_no_address_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one message, not as an error of a library."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@[::1")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI") as raised:
        tracking_uri()
    assert "hush" not in str(raised.value)


def test_a_password_that_an_address_holds_is_hidden_alone_too() -> None:
    """A server's message may repeat it without its address."""
    redactor = Redactor({"MLFLOW_TRACKING_URI": "postgresql://mlflow:hu%40sh-77@db/x?sslpassword=other-77"})
    assert redactor.text("mlflow: hu@sh-77, hu%40sh-77, other-77") == "mlflow: ***, ***, ***"


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 10, "ghp_" + "aB3" * 12, "glpat-" + "aB-" * 8, "AKIA" + "AB34" * 4])
def test_a_token_is_known_by_its_shape(token: str) -> None:
    """Also where no variable holds it: in the name of a folder, say."""
    assert Redactor({}).text(f"/data/{token}/train.jsonl") == "/data/***/train.jsonl"


def test_a_tree_keeps_its_form(tmp_path: Path) -> None:
    """Numbers stay numbers, keys stay ours, strings lose secrets at every depth."""
    redactor = Redactor({"A_TOKEN": "s3cr3t-1"})
    tree = {"a": ["s3cr3t-1", 1.5, None, {"b": ("x s3cr3t-1",)}], "s3cr3t-1": True}
    assert redactor.tree(tree) == {"a": [HIDDEN, 1.5, None, {"b": [f"x {HIDDEN}"]}], "s3cr3t-1": True}


def test_a_stream_shows_none() -> None:
    """Written as a text or as lines; everything else is that of the stream behind it."""
    behind = io.StringIO()
    stream = RedactedStream(behind, Redactor({"A_TOKEN": "s3cr3t-1"}))
    assert stream.write("a s3cr3t-1\n") == len("a s3cr3t-1\n")
    stream.writelines(["b s3cr3t-1\n", "c\n"])
    print("d", "s3cr3t-1", file=stream)  # type: ignore[call-overload]
    assert stream.getvalue() == f"a {HIDDEN}\nb {HIDDEN}\nc\nd {HIDDEN}\n"
    assert not stream.isatty()


# --- everything that a run writes --------------------------------------------------------------------------------

PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted99",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/abcdefgh1234",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-password-7",
    "MY_API_KEY": "planted_custom_key_31337",
}


def files_with_secrets(folder: Path) -> list[str]:
    """Files below a folder whose name or content holds a planted secret, the texts of Parquet files included."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".parquet":
            content += json.dumps(pq.read_table(path).to_pylist()).encode()
        if path.name == "adapter_config.json":  # PEFT's own: where the base model lies, as its user wrote it
            continue
        text = content + str(path.relative_to(folder)).encode()
        found += [f"{path}: {name}" for name, secret in PLANTED.items() if secret.encode() in text]
    return found


def test_secrets_planted_everywhere_are_found_nowhere(tmp_path: Path) -> None:
    """In variables, in the store's address, in the path of the data and in the name of the run: not in the spool, the
    run's folder, artifacts, the database, nor on the terminal; of a run that went well and of one that failed.
    """
    password, token, key = (PLANTED[name] for name in ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "MY_API_KEY"))
    cache, work = tmp_path / "elsewhere" / token, tmp_path / "work"
    cache.mkdir(parents=True)
    work.mkdir()
    settings = flags(
        SMALL | {"training.max_steps": "1", "tracking.generate_records": "0", "tracking.close_seconds": "0"}
    )
    variables = PLANTED | {"XDG_CACHE_HOME": str(cache)}  # where the built-in data is written to, and read from
    away = f"http://me:{password}@127.0.0.1:9"
    done = trainer(
        "run", "last6_lora", "--training.run_name", f"arm-{key}", *settings, cwd=work, store=away, **variables
    )
    assert done.returncode == 0, done.stderr
    bad = ["--train_jsonl", f"{tmp_path}/{token}.jsonl", "--val_jsonl", f"{tmp_path}/{token}.jsonl"]
    failed = trainer("run", "last6_lora", *bad, *settings, cwd=work, store=away, **variables)
    assert failed.returncode == 2, failed.stderr
    synced = trainer("sync", "output", cwd=work, store=empty_store(work), **variables)
    assert synced.returncode == 0, synced.stderr
    (work / "terminal.txt").write_text("".join(part.stdout + part.stderr for part in (done, failed, synced)))

    (run,) = runs_in(f"sqlite:///{work}/mlflow.db")
    assert run.info.status == "FINISHED" and HIDDEN in run.inputs.dataset_inputs[0].dataset.source
    assert run.info.run_name == f"arm-{HIDDEN}"
    assert {path.name for path in work.iterdir()} >= {"output", "mlruns", "mlflow.db"}
    assert files_with_secrets(work) == []

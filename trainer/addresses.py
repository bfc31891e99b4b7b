"""Addresses of tracking stores: the one in use, and what may be shown of it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer import names
from trainer.errors import TrackingError
from trainer.redact import HIDDEN_KEYS

_SECRET = re.compile(rf"(?i)([?&][^=&]*(?:{HIDDEN_KEYS})[^=&]*=)[^&#]*")
_DATABASE_USER = re.compile(r"(?<=://)[^/:@?]*:[^?]*@")
"""SQLAlchemy takes a password with a slash in it, which is no part of a host elsewhere."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where runs are logged."""

    uri: str
    """Without user and password of a server."""
    away: str
    """Why it cannot be reached at the moment; empty where it can."""

    @property
    def name(self) -> str:
        """What it is called everywhere: without passwords, and the same from every folder."""
        return store_name(self.uri)


def store_name(uri: str) -> str:
    """A store's address without passwords; a file's is made absolute."""
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{sqlite_file(uri).resolve()}"
    return without_password(uri)


def tracking_uri() -> str:
    """The store in use.

    Raises:
        TrackingError: it is a file store, which MLflow has deprecated and on which replay is not safe.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or names.DEFAULT_TRACKING_URI
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise TrackingError(
            "MLFLOW_TRACKING_URI",
            f"{_DATABASE_USER.sub('', uri)} ({error})",
            "an address such as sqlite:///mlflow.db or http://HOST:5000",
            "correct MLFLOW_TRACKING_URI",
        ) from None
    if scheme in ("", "file") and uri != "databricks":
        raise TrackingError(
            "MLFLOW_TRACKING_URI",
            f"{uri}, a file store",
            "a database or an MLflow server; MLflow has deprecated file stores",
            f"unset it (default: {names.DEFAULT_TRACKING_URI}), or move old runs with `mlflow migrate-filestore`",
        )
    return uri


def without_password(uri: str) -> str:
    """A URI that can be shown: user and password, where it has them, are left out."""
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        uri = uri.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)
    elif parts.scheme not in ("http", "https"):
        uri = _DATABASE_USER.sub("", uri)
    return _SECRET.sub(r"\1***", uri)


def without_credentials(uri: str) -> str:
    """A server's URI without user and password, which go where MLflow takes them from without ever showing them."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return without_password(uri)


def sqlite_file(uri: str) -> Path:
    """The file of a `sqlite:///` URI."""
    return Path(unquote(uri.partition("///")[2].partition("?")[0]))

"""The model that MLflow serves: images as base64 in, objects out. It opens no file and no address of its callers."""

import base64
import binascii
import warnings
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types import ColSpec, DataType, Schema

from trainer.inference.predictor import Predictor, load_predictor

COLUMN = "image"
MAX_BYTES = 2**26
"""Of an image, decoded."""
_AT_ONCE = 16


class Captioner:
    """What `mlflow models serve` and `mlflow.pyfunc.load_model` call."""

    def __init__(self, predictor: Predictor) -> None:
        """Serve a loaded model."""
        self._predictor = predictor

    def predict(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Caption images.

        Args:
            frame: a column `image` with the bytes of an image file in base64, a row an image.
            params: none are known.

        Returns:
            For each row width and height in pixels, objects in pixels, whether the answer was sound; or an `error`.

        Raises:
            MlflowException: the request is not of that form; a server answers 400.
        """
        if COLUMN not in getattr(frame, "columns", ()):
            raise _bad_request(f"expected a column `{COLUMN}` with image files in base64")
        files = [_decoded(row, value) for row, value in enumerate(frame[COLUMN].tolist())]
        return [made.as_json() for made in self._predictor.predict_bytes(files, batch_size=_AT_ONCE)]


def _load_pyfunc(data_path: str) -> Captioner:
    """What MLflow calls to load the model; the name is its own."""
    return Captioner(load_predictor(Path(data_path)))


def save_served(model: Path, folder: Path) -> None:
    """Make an MLflow model of an exported one.

    Args:
        model: a folder that `load_predictor` takes; it is copied.
        folder: where the MLflow model is to stand; not there yet.
    """
    try:
        needed = [line for line in requires("vision-tower-experiments") or () if ";" not in line]
    except PackageNotFoundError:
        needed = []
    warnings.filterwarnings("ignore", "(?s).*input example")  # it would be run, and there is a signature
    pyfunc.save_model(
        str(folder),
        loader_module=__name__,
        data_path=str(model),
        signature=ModelSignature(inputs=Schema([ColSpec(DataType.string, COLUMN)])),
        pip_requirements=needed,  # else MLflow loads the model to see what it imports
    )


def _decoded(row: int, value: object) -> bytes:
    if not isinstance(value, str):
        raise _bad_request(f"row {row}: expected a text in base64, got {type(value).__name__}")
    if len(value) > MAX_BYTES * 4 // 3 + 4:
        raise _bad_request(f"row {row}: an image of more than {MAX_BYTES // 2**20} MiB")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise _bad_request(f"row {row}: no base64: send the bytes of the image file, not its name") from None


def _bad_request(text: str) -> MlflowException:
    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)

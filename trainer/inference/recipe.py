"""What a checkpoint says of how it was trained, as far as using it depends on that; it stands in the manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer import provenance
from trainer.checkpoint import MANIFEST, BadCheckpoint, verify
from trainer.data.geometry import EmitNorm
from trainer.data.prompts import Language, Scheme, Taxonomy
from trainer.data.template import Encoder
from trainer.errors import ModelError
from trainer.model import Tools

KEY = "trained_as"
"""Of a manifest."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter was trained.

    Attributes:
        strategy: the arm.
        seed: of the run.
        training_key: by which the run is found in MLflow.
        base_model: `pocket`, `random:SIZE`, a folder, or a hub id.
        base_digest: of its weights, 32 hex characters.
        train_digest: of the training records and their images.
        val_digest: likewise of validation.
        torch_dtype: of frozen weights.
        scheme: of the prompts.
        language: of the prompts.
        emit_norm: frame of the answers' coordinates.
        taxonomy: what scheme B quotes; None where there is none.
        max_length: tokens of a training sample at most.
        max_pixels: of an image, above which it is made smaller; None: never.
        step: optimizer steps after which it was saved.
        merged: the folder holds a whole model in the place of an adapter.
    """

    strategy: str
    seed: int
    training_key: str
    base_model: str
    base_digest: str
    train_digest: str
    val_digest: str
    torch_dtype: str
    scheme: Scheme
    language: Language
    emit_norm: EmitNorm
    taxonomy: Taxonomy | None
    max_length: int
    max_pixels: int | None
    step: int = 0
    merged: bool = False

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {KEY: asdict(self)}

    def encoder(self, tools: Tools) -> Encoder:
        """What makes prompts as in training."""
        return Encoder(
            tools.tokenizer,
            tools.image_processor,
            scheme=self.scheme,
            language=self.language,
            emit_norm=self.emit_norm,
            taxonomy=self.taxonomy,
            max_length=self.max_length,
            truncation="raise",
            max_pixels=self.max_pixels,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen weights."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.torch_dtype]

    def on(self, base: str) -> "Recipe":
        """The same on a base model that lies elsewhere (empty: where it lay), held against the one it was trained on.

        Raises:
            ModelError: the base cannot be had, or has other weights.
        """
        if self.merged:
            return self  # its weights are those that its manifest vouches for
        base = base or self.base_model
        there = provenance.base_digest(base, self.seed)
        if there != self.base_digest:
            raise ModelError(
                f"--base {base}",
                f"weights with the digest {there}",
                f"the base that the adapter was trained on ({self.base_model} then), {self.base_digest}",
                "name the folder of that base with --base",
            )
        return replace(self, base_model=base)


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a checkpoint whose files are all as they were written.

    Raises:
        ModelError: it is no checkpoint of this trainer, or is damaged.
    """
    try:
        manifest = verify(folder)
        known: Mapping[str, Any] = dict(manifest[KEY])
        taxonomy = known["taxonomy"]
        parts = taxonomy and {
            "types": tuple(taxonomy["types"]),
            "attributes": tuple((name, tuple(values)) for name, values in taxonomy["attributes"]),
            "rules": tuple(taxonomy["rules"]),
        }
        read = Recipe(**{**known, "taxonomy": Taxonomy(**parts) if parts else None})
        return replace(read, base_model=str(folder) if read.merged else read.base_model, step=int(manifest["step"]))
    except KeyError:
        problem = f"a {MANIFEST} that does not say how it was trained: an older version of the trainer has written it"
    except (BadCheckpoint, TypeError, ValueError) as error:
        problem = str(error)
    raise ModelError(
        f"checkpoint {folder}",
        problem,
        f"a folder that a run has written (output/RUN/best) with its {MANIFEST}, an MLflow run, or models:/NAME@ALIAS",
        "check the path; a damaged checkpoint has to be copied or trained again",
    )

"""Which parts of the model are trained and how: the `strategy` section, and `tuner` with its raw form of the same."""

import itertools
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.fields import Impossible, Names, Section, Span
from trainer.config.problems import shown

Method = Literal["lora", "full", "frozen"]
"""How the blocks of a part are trained: low-rank adapters, whole copies, or not at all."""

RAW_STRATEGY_KEYS = ("freeze_llm", "freeze_vit", "freeze_aligner", "target_modules", "target_regex", "modules_to_save")
"""Keys of `tuner` that say what the `strategy` section says, in the form of existing files."""


class Tuner(Section):
    """LoRA's size, and the raw form in which existing files say what is trained (instead of `strategy`)."""

    train_type: Literal["lora"] = "lora"
    """Everything goes through PEFT: adapters, and whole copies beside them."""
    freeze_llm: bool | None = None
    """Raw form: true keeps `target_modules` out of the language model; null: false."""
    freeze_vit: bool | None = None
    """Raw form: true keeps `target_modules` out of the vision tower; null: true."""
    freeze_aligner: bool | None = None
    """Raw form: true keeps `target_modules` out of both kinds of merger; null: true."""
    target_modules: Names | None = None
    """Raw form: last names of linear layers that get LoRA, or `all-linear`, in parts that are not frozen; null: all."""
    target_regex: str | None = None
    """Raw form: regular expression for full names of linear layers that get LoRA; null: `target_modules` decides."""
    modules_to_save: Names | None = None
    """Raw form: full names of the modules that are fine-tuned whole; null: none."""
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of each LoRA pair."""
    lora_alpha: Annotated[float, Field(gt=0, le=10**6)] = 32.0
    """LoRA's numerator: what an adapter adds is scaled by alpha / rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a LoRA branch's inputs set to zero while training."""
    lora_bias: Literal["none"] = "none"
    """Biases of the base model are never trained beside LoRA."""

    @model_validator(mode="after")
    def _regex_compiles(self) -> "Tuner":
        try:
            re.compile(self.target_regex or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise Impossible(
                shown(self.target_regex), "a Python regular expression", f"correct it: {error}", "target_regex"
            ) from error
        return self


def _check_span(section: str, key: str, span: str, method: Method) -> None:
    """Refuse blocks without a method and a method without blocks."""
    if (span == "none") != (method == "frozen"):
        raise Impossible(
            f"{key} {span} with method {method}",
            f"{key} none with method frozen, or other {key} with method lora or full",
            f"set {section}.{key} and {section}.method together",
        )


class VisionStage(Section):
    """One entry of `strategy.vision.schedule`: from when which vision blocks train."""

    from_: Annotated[float, Field(ge=0, lt=1, alias="from")]
    """Share of all optimizer steps that are done when it begins."""
    blocks: Span
    """All vision blocks that train from then on, those of the stages before among them."""


class VisionStrategy(Section):
    """What is trained of the vision blocks."""

    blocks: Span = "none"
    """Vision blocks from 0: all, none, last-N, A-B (both included), or numbers split by commas."""
    method: Method = "frozen"
    """How they are trained: lora, full, or frozen (with `blocks: none`)."""
    schedule: Annotated[tuple[VisionStage, ...] | None, Field(strict=False)] = None
    """Stages instead of `blocks`, each {from: share of the steps, blocks: all that train then}; null: one stage."""

    @property
    def stages(self) -> tuple[tuple[float, str], ...]:
        """(Share of all optimizer steps before it, blocks that train in it) of each stage; one without a schedule."""
        return tuple((stage.from_, stage.blocks) for stage in self.schedule or ()) or ((0.0, self.blocks),)

    @model_validator(mode="after")
    def _agree(self) -> "VisionStrategy":
        if self.schedule is None:
            _check_span("strategy.vision", "blocks", self.blocks, self.method)
        else:
            self._check_schedule([stage.from_ for stage in self.schedule])
        return self

    def _check_schedule(self, shares: list[float]) -> None:
        """Refuse a schedule beside blocks, without a method, or in no order."""
        if self.blocks != "none":
            raise Impossible(
                f"blocks {self.blocks} and a schedule",
                "either strategy.vision.blocks or strategy.vision.schedule",
                "take the schedule out, or set strategy.vision.blocks to none: the schedule names the blocks",
                "blocks",
            )
        if self.method == "frozen":
            raise Impossible(
                "a schedule with method frozen",
                "method lora or full, the same in all stages",
                "set strategy.vision.method, or set strategy.vision.schedule to null",
                "method",
            )
        if not shares or shares[0] != 0 or any(a >= b for a, b in itertools.pairwise(shares)):
            raise Impossible(
                "a schedule without stages" if not shares else f"stages from {', '.join(map(str, shares))}",
                "the first stage from 0.0, every other one later than the one before it",
                "order the stages by `from`, beginning with 0.0",
                "schedule",
            )
        if empty := [stage.from_ for stage in self.schedule or () if stage.blocks == "none"]:
            raise Impossible(
                f"no blocks in the stage from {empty[0]}",
                "in every stage the blocks that train from then on",
                "name blocks, such as last-2",
                "schedule",
            )


class AlignerStrategy(Section):
    """What is trained of the merger and the DeepStack mergers."""

    method: Method = "full"
    """How they are trained: lora, full, or frozen."""


class LlmStrategy(Section):
    """What is trained of the language model's layers."""

    layers: Span = "last-2"
    """Language-model layers from 0, written like vision blocks."""
    method: Method = "lora"
    """How they are trained: lora, full, or frozen (with `layers: none`)."""

    @model_validator(mode="after")
    def _agree(self) -> "LlmStrategy":
        _check_span("strategy.llm", "layers", self.layers, self.method)
        return self


class Strategy(Section):
    """What is trained and how, as data; resolved against the model's real depth."""

    vision: VisionStrategy = VisionStrategy()
    """The vision blocks."""
    aligner: AlignerStrategy = AlignerStrategy()
    """`visual.merger` and `visual.deepstack_merger_list`, which always go together."""
    llm: LlmStrategy = LlmStrategy()
    """The language model."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Strategy":
        if {self.vision.method, self.aligner.method, self.llm.method} == {"frozen"}:
            raise Impossible("three frozen parts", "at least one part with method lora or full", "train something")
        return self

"""Floating-point operations of a micro-batch, by part and by way through the model; two a multiply-add.

A product of rows with a weight of N elements is 2 N operations a row forward, as many for the gradient of its input and
as many for that of its weight, which is made for trained tensors alone; so a model that trains whole takes 6 N a token
(Kaplan et al. 2020, arXiv:2001.08361). Attention is two products forward and four backward over the pairs of rows that
see each other (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, with the causal half left out and pairs counted
within samples). Norms, gates and the embedding are no products and are not counted here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from trainer.cost.anatomy import Anatomy, Layer, Stack
from trainer.cost.layer_memory import Format, kept
from trainer.cost.memory import Again, Remade
from trainer.cost.microbatch import MicroBatch
from trainer.strategy import Part


class Where(StrEnum):
    """What of the model computes."""

    FROZEN_VISION = "vision, frozen beginning"
    VISION = "vision, from the first trained block"
    ALIGNER = "aligner"
    LLM = "llm"
    HEAD = "head and loss"


@dataclass(frozen=True, slots=True)
class Operations:
    """Of one part."""

    forward: float = 0.0
    inputs: float = 0.0
    """Backward: gradients of what products read."""
    weights: float = 0.0
    """Backward: gradients of what trains."""
    again: float = 0.0
    """Forward once more, for checkpointed layers and inside flash-attention."""
    attention: float = 0.0
    """So many of all these are attention's."""

    @property
    def useful(self) -> float:
        """What nobody can do without: MFU counts these (PaLM, appendix B)."""
        return self.forward + self.inputs + self.weights

    @property
    def done(self) -> float:
        """What is computed."""
        return self.useful + self.again

    @property
    def products(self) -> float:
        """All that is not attention."""
        return self.done - self.attention

    def times(self, factor: float) -> "Operations":
        """So many times all of it."""
        return Operations(*(factor * getattr(self, each.name) for each in fields(self)))

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def operations_of(of: Anatomy, batch: MicroBatch, remade: Remade, *, training: bool = True) -> dict[Where, Operations]:
    """Operations of a micro-batch, by part.

    Args:
        of: the model, and what of it trains.
        batch: what is computed.
        remade: which layers run forward again, as `peak_memory` has found.
        training: False: an evaluation, which has no backward pass.
    """
    found = {where: Operations() for where in Where}
    embedding = 2.0 * batch.patches * of.patch * of.vision.width
    found[Where.FROZEN_VISION if of.vision.frozen else Where.VISION] += Operations(forward=embedding)
    for part, stack in ((Part.VISION, of.vision), (Part.LLM, of.text)):
        for index, layer in enumerate(stack.layers):
            words = index >= stack.frozen
            rows = batch.patches if part is Part.VISION else batch.rows(words=words)
            pairs = batch.image_pairs if part is Part.VISION else batch.pairs(words=words)
            again = remade.get((part, index))
            made = _of_layer(stack, index, layer, rows, pairs, again, training=training)
            found[_where(part, stack, index)] += made
    found[Where.ALIGNER] = _of_mergers(of, batch.patches // of.merged, training=training)
    head = 2.0 * batch.supervised * of.vocabulary * of.text.width
    reached = training and of.text.layers[-1].reached
    found[Where.HEAD] = Operations(forward=head, inputs=head if reached else 0.0)
    return found


def total(parts: Mapping[Where, Operations]) -> Operations:
    """Of all parts together."""
    return sum(parts.values(), start=Operations())


def small_bytes(of: Anatomy, batch: MicroBatch, remade: Remade, form: Format) -> float:
    """A measure of what norms, gates and rotary embedding read and write: what layers make, once for each pass.

    A backward pass counts twice, a layer that runs forward again once more.
    """
    moved = 0
    for part, stack in ((Part.VISION, of.vision), (Part.LLM, of.text)):
        for index, layer in enumerate(stack.layers):
            rows = batch.patches if part is Part.VISION else batch.rows(words=index >= stack.frozen)
            passes = (3 if layer.reached else 1) + (remade.get((part, index)) is Again.ALL)
            moved += passes * kept(stack, layer, rows, form, dropout=False)
    return float(moved)


def _where(part: Part, stack: Stack, index: int) -> Where:
    if part is Part.LLM:
        return Where.LLM
    return Where.FROZEN_VISION if index < stack.frozen else Where.VISION


def _of_layer(
    stack: Stack, index: int, layer: Layer, rows: int, pairs: float, again: Again | None, *, training: bool
) -> Operations:
    sizes = [2.0 * rows * product.size for product in layer.products]
    adapters = [2.0 * rows * product.adapters for product in layer.products]
    attention = 4.0 * pairs * stack.attended
    forward = sum(sizes) + sum(adapters) + attention
    if not training or not layer.reached:
        return Operations(forward=forward, attention=attention)
    passed = sizes if stack.passes_on(index) else sizes[1:]  # the first product of all reads what needs no gradient
    weights = sum(size for size, product in zip(sizes, layer.products, strict=True) if product.full)
    scores = attention / 2  # flash-attention makes them again (Dao 2023, arXiv:2307.08691)
    remade = 0.0
    if again is Again.WIDE:
        remade = sizes[2] + adapters[2]
    elif again is Again.ALL:
        remade = sum(sizes[:3]) + sum(adapters[:3]) + attention
    return Operations(
        forward=forward,
        inputs=sum(passed) + sum(adapters) + 2 * attention,
        weights=weights + sum(adapters),
        again=remade + scores,
        attention=3 * attention + scores + (attention if again is Again.ALL else 0.0),
    )


def _of_mergers(of: Anatomy, rows: int, *, training: bool) -> Operations:
    found = Operations()
    before = of.vision.layers[-1].reached
    for pair in of.mergers:
        for first, product in zip((True, False), pair, strict=True):
            size, adapters = 2.0 * rows * product.size, 2.0 * rows * product.adapters
            back = training and of.aligner_reached
            passed = back and (before or not first)
            found += Operations(
                forward=size + adapters,
                inputs=(size if passed else 0.0) + (adapters if back else 0.0),
                weights=((size if product.full else 0.0) + adapters) if back else 0.0,
            )
    return found

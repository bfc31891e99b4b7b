"""Peak memory of a rank: walks through a step of the fused pass and says what is there when most is there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from trainer.cost.anatomy import Anatomy, Layer, Stack
from trainer.cost.layer_memory import FLOAT, Format, in_backward, in_forward, kept, masks, wide
from trainer.cost.microbatch import MicroBatch
from trainer.strategy import Part

MOMENTS = 2
"""AdamW remembers two numbers of each that trains (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

_CPU_ROWS = 64
"""Rows are rounded up to a multiple of it on a CPU (`trainer.fused.products.rounding`)."""
_LOGITS_AT_ONCE = 2**25
"""Numbers of a piece of the logits on a CPU (`trainer.fused.head`); four times that on a GPU."""
_SPARE = 12
"""A checkpointed layer keeps more than its input while so many of its widest rows are free (`trainer.fused.layers`)."""
_BUCKET = 200_000_000
"""Elements that ZeRO exchanges at once, at most (`trainer.zero2`)."""


class Again(StrEnum):
    """What of a checkpointed layer runs forward again in the backward pass."""

    WIDE = "the MLP's first product"
    ALL = "all but the MLP's last product"


Remade = Mapping[tuple[Part, int], Again]
"""By part and index of the layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is laid out on its devices."""

    weight: int
    """Bytes of a number of the frozen base."""
    format: Format
    card: int | None = None
    """Bytes of a GPU; None: a CPU, or a card that has room for everything."""
    ranks: int = 1
    zero: int = 0
    """ZeRO's stage; 0: off."""
    accumulation: int = 1
    """Micro-batches of a step on one rank."""
    checkpointed: frozenset[Part] = frozenset()
    """Parts whose layers run forward again in the backward pass."""
    inputs_only: bool = False
    """Whether checkpointed layers keep their input alone, also where there is room for more."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at the moment at which it holds most."""

    base: int
    """Weights of the base model, the originals of full copies too."""
    trained: int
    """Adapters and full copies, float32."""
    gradients: int
    moments: int
    exchange: int
    """Buffers of the exchange of gradients, and ZeRO's masters of this rank's piece."""
    inputs: int
    activations: int
    """Kept by the forward pass for the backward pass."""
    working: int
    """Held for a moment."""
    at: str
    """When it is."""
    remade: Remade = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, int]:
        """Name -> bytes, in the order of the fields."""
        names = ("base", "trained", "gradients", "moments", "exchange", "inputs", "activations", "working")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def peak_memory(of: Anatomy, batch: MicroBatch, layout: Layout) -> Memory:
    """Peak memory of a rank in a step that is not the first, without the CUDA context and the allocator's gaps.

    Args:
        of: the model, and what of it trains.
        batch: the largest micro-batch of the rank.
        layout: formats, ranks, checkpointing.
    """
    walk = _Walk(of, batch, layout)
    walk.forward()
    walk.backward()
    return replace(walk.most, remade=walk.remade)


def states(of: Anatomy, batch: MicroBatch, layout: Layout) -> Memory:
    """What is there all the time: everything but gradients, activations and what is held for a moment."""
    n, pieces = of.all_trained, layout.ranks if layout.zero else 1
    exchange = 0
    if layout.zero:
        exchange = n * FLOAT // pieces + min(_BUCKET, n) * FLOAT
    elif layout.ranks > 1:
        exchange = n * FLOAT
    token = 8 + 1 + 4 * 8 + 4 * 8  # id, supervised, positions, and the row without what samples share
    words = 2 * of.text.keys * layout.format.row * batch.shared * of.text.frozen
    return Memory(
        base=sum(of.parameters.values()) * layout.weight,
        trained=n * FLOAT,
        gradients=0,
        moments=MOMENTS * n * FLOAT // pieces,
        exchange=exchange,
        inputs=batch.patches * of.patch * FLOAT + batch.tokens * token + words,
        activations=0,
        working=0,
        at="between steps",
    )


@dataclass(frozen=True, slots=True)
class _Passed:
    """A layer that the forward pass has been through."""

    name: str
    stack: Stack
    layer: Layer
    rows: int
    kept: int
    again: int
    """Bytes that the backward pass makes again."""


class _Walk:
    """One step, moment by moment."""

    def __init__(self, of: Anatomy, batch: MicroBatch, layout: Layout) -> None:
        self._of, self._batch, self._layout, self._format = of, batch, layout, layout.format
        self._state = states(of, batch, layout)
        self._pieces = layout.ranks if layout.zero == 2 else 1  # stage 1 splits no gradients
        self._gradients = of.all_trained * FLOAT // self._pieces if layout.accumulation > 1 else 0
        self._kept = 0
        self._passed: list[_Passed] = []
        self.remade: dict[tuple[Part, int], Again] = {}
        self.most = self._state
        self._note("the update", 0, gradients=of.all_trained * FLOAT // self._pieces)

    def forward(self) -> None:
        """From patches to losses."""
        of, batch = self._of, self._batch
        patches, row = self._rounded(batch.patches), of.vision.width * self._format.row
        frozen = of.vision.frozen
        places = len({tap for tap in of.taps if tap < frozen} | ({frozen - 1} if frozen else set()))
        self._kept += places * patches * row
        if frozen:  # the rows of every frozen block are there until the last of them is done
            block = kept(of.vision, of.vision.layers[0], patches, self._format, dropout=False)
            self._note("forward, frozen vision blocks", block + frozen * patches * row)
        self._through("vision block", Part.VISION, of.vision, patches, patches)
        if of.aligner_reached:
            self._kept += self._mergers()
        rows, with_words = (self._rounded(batch.rows(words=words)) for words in (False, True))
        self._through("LLM layer", Part.LLM, of.text, rows, with_words)
        self._kept += self._head()
        self._note("forward, loss", self._logits())

    def backward(self) -> None:
        """From losses to gradients."""
        self._kept -= self._head()
        mergers = self._of.aligner_reached
        for passed in reversed(self._passed):
            if mergers and passed.stack is self._of.vision:
                self._back_through_mergers()
                mergers = False
            working = passed.again + in_backward(
                passed.stack, passed.layer, passed.rows, self._format, dropout=self._of.dropout
            )
            self._add_gradients(f"backward, {passed.name}", working, passed.layer.trained)
            self._kept -= passed.kept
        if mergers:
            self._back_through_mergers()

    def _through(self, noun: str, part: Part, stack: Stack, rows: int, with_words: int) -> None:
        """All layers of a stack; those that no gradient reaches keep nothing."""
        dropout = self._of.dropout
        for index, layer in enumerate(stack.layers):
            if not layer.reached:
                continue
            count = with_words if index >= stack.frozen else rows
            whole = kept(stack, layer, count, self._format, dropout=dropout)
            self._note(
                f"forward, {noun} {index}", whole + in_forward(stack, layer, count, self._format, dropout=dropout)
            )
            widest, x = wide(stack, count, self._format), count * stack.width * self._format.row
            stays, again = whole, 0
            if part in self._layout.checkpointed:
                room = self._has_room(widest, whole + x)
                self.remade[part, index] = Again.WIDE if room else Again.ALL
                stays = whole - widest if room else x + masks(layer, count, dropout=dropout)
                again = widest + x if room else whole - stays
            self._kept += stays
            self._passed.append(_Passed(f"{noun} {index}", stack, layer, count, stays, again))

    def _has_room(self, widest: int, here: int) -> bool:
        """See `trainer.fused.layers._has_room`."""
        if not self._format.gpu or self._layout.inputs_only:
            return False
        if self._layout.card is None:
            return True
        free = self._layout.card - self._state.total - self._gradients - self._kept - here
        return free > _SPARE * widest

    def _mergers(self) -> int:
        """Kept by transformers' mergers, whose norms are float32 and whose products' inputs are rows."""
        merged, size = self._batch.patches // self._of.merged, self._format.row
        bytes_a_token = 0
        for first, second in self._of.mergers:
            cast = size < FLOAT
            bytes_a_token += first.inputs * (size + (FLOAT if cast else 0)) + 2 * second.inputs * size
            bytes_a_token += second.outputs * size
        weights = sum(product.size for pair in self._of.mergers for product in pair) * size if size < FLOAT else 0
        return merged * bytes_a_token + weights

    def _back_through_mergers(self) -> None:
        """Of one after the other; their gradients are made here."""
        merged = self._batch.patches // self._of.merged
        widest = max(first.outputs for first, _ in self._of.mergers)
        rows = len(self._of.mergers) * self._of.text.width + 3 * widest
        self._add_gradients("backward, aligner", merged * rows * FLOAT, self._of.trained[Part.ALIGNER])
        self._kept -= self._mergers()

    def _head(self) -> int:
        """Kept from the last norm to the loss: rows before and behind the norm, their gradient, the norm's float32."""
        rows = self._rounded(self._batch.supervised)
        return rows * self._of.text.width * (3 * self._format.row + FLOAT + (FLOAT if self._format.row < FLOAT else 0))

    def _logits(self) -> int:
        """Pieces of the logits: the one at work, and what the variables still hold of the one before."""
        gpu, size = self._format.gpu, self._format.row
        rows = self._rounded(self._batch.supervised)
        at_once = max(1, _LOGITS_AT_ONCE * (4 if gpu else 1) // self._of.vocabulary)
        numbers = min(rows, at_once) * self._of.vocabulary
        floats = 3 if rows > at_once else 2
        return numbers * (floats * FLOAT + (size if size < FLOAT else 0))

    def _add_gradients(self, at: str, working: int, trained: int) -> None:
        """A moment at which gradients of so many parameters are made, beside others that are there already."""
        own = trained * FLOAT
        if self._layout.accumulation > 1:
            self._note(at, working + own)
        else:  # this rank's piece of them stays
            self._gradients += own // self._pieces
            self._note(at, working + own - own // self._pieces)

    def _note(self, at: str, working: int, *, gradients: int | None = None) -> None:
        """A moment at which so much is held beside what is kept."""
        held = self._gradients if gradients is None else gradients
        moment = replace(self._state, gradients=held, activations=self._kept, working=working, at=at)
        if moment.total > self.most.total:
            self.most = moment

    def _rounded(self, rows: int) -> int:
        return rows if self._format.gpu else -(-rows // _CPU_ROWS) * _CPU_ROWS

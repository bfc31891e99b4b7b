"""Bytes of one layer in the fused pass: what it keeps for its gradient, and what it holds for a moment.

Each line here is a line of `trainer/fused/layers.py`; a test measures a whole step against the sum.
"""

from dataclasses import dataclass

from trainer.cost.anatomy import Layer, Product, Stack

FLOAT = 4
"""Bytes of a float32, in which sums, norms and all that trains are kept."""


@dataclass(frozen=True, slots=True)
class Format:
    """In what a pass computes."""

    row: int
    """Bytes of a number of a row: 2 in bfloat16, 4 in float32."""
    gpu: bool


def kept(stack: Stack, layer: Layer, rows: int, of: Format, *, dropout: bool) -> int:
    """What the forward pass keeps: input, products, attention, factors of norms, adapters' rows, dropout masks.

    Args:
        stack: of the layer.
        layer: the layer.
        rows: that pass it.
        of: number format.
        dropout: whether adapters drop out.
    """
    numbers = 2 * stack.width + stack.attended + 2 * stack.keys + stack.attended + stack.wide
    numbers += sum(product.ranks for product in layer.products)
    factors = 2 if stack.causal else 4  # a layer norm has a mean beside its factor
    sums = stack.heads * (FLOAT if of.gpu else of.row)
    return rows * (numbers * of.row + sums + factors * FLOAT) + masks(layer, rows, dropout=dropout)


def masks(layer: Layer, rows: int, *, dropout: bool) -> int:
    """Dropout masks, a byte a number."""
    return rows * sum(product.inputs for product in layer.products if product.ranks) if dropout else 0


def wide(stack: Stack, rows: int, of: Format) -> int:
    """The widest rows of a layer: what goes into the MLP's gate."""
    return rows * stack.wide * of.row


def in_forward(stack: Stack, layer: Layer, rows: int, of: Format, *, dropout: bool) -> int:
    """Held for a moment beside what is kept: turned heads, or the gate's output with the layer's."""
    turned = stack.width + stack.attended + stack.keys
    adapted = layer.down.inputs if layer.down.ranks and dropout else 0
    return rows * of.row * max(turned, stack.width + stack.gated + adapted)


def in_backward(stack: Stack, layer: Layer, rows: int, of: Format, *, dropout: bool) -> int:
    """The most that a backward pass holds beside what was kept; its local tensors live until it ends."""
    d, m, w, a, k = stack.width, stack.gated, stack.wide, stack.attended, stack.keys
    held = d  # the gradient that comes in
    most = 0

    def stage(*, for_a_moment: int, stays: int) -> None:
        nonlocal held, most
        most = max(most, held + for_a_moment)
        held += stays
        most = max(most, held)

    if layer.down.trained:
        stage(for_a_moment=0, stays=m)  # what went into the last product, made again
    stage(for_a_moment=m + _adapters(layer.down, dropout=dropout), stays=m)
    stage(for_a_moment=w, stays=w)
    if layer.up.trained:
        stage(for_a_moment=_normed(d, of), stays=d)
    stage(for_a_moment=d + _adapters(layer.up, dropout=dropout), stays=d)
    stage(for_a_moment=d, stays=d)
    stage(for_a_moment=a + _adapters(layer.out, dropout=dropout), stays=a)
    stage(for_a_moment=0, stays=a + k)  # queries and keys, turned again
    stage(for_a_moment=a + 2 * k + _attention(stack, of), stays=a + 2 * k)
    stage(for_a_moment=a + 2 * k, stays=a + 2 * k)
    if layer.qkv.trained:
        stage(for_a_moment=_normed(d, of), stays=0 if layer.up.trained else d)
    stage(for_a_moment=d + _adapters(layer.qkv, dropout=dropout), stays=0)
    stage(for_a_moment=d, stays=0)
    return rows * of.row * most


def _adapters(product: Product, *, dropout: bool) -> int:
    """Rows that adapters make of a product's input: their gradient, and where they drop out, what is left of it."""
    if not product.ranks:
        return 0
    return product.inputs * (2 if dropout else 1)


def _normed(width: int, of: Format) -> int:
    """A norm that is made again is computed in float32."""
    return width * (1 + FLOAT // of.row)


def _attention(stack: Stack, of: Format) -> int:
    """What flash-attention's backward pass holds: a float32 sum of queries' gradients, keys' for every head."""
    if not of.gpu:
        return 0
    return stack.attended * FLOAT // of.row + (2 * stack.attended if stack.keys < stack.attended else 0)

"""Seconds of a step from its operations: products, attention and small operations each at a measured rate."""

from dataclasses import dataclass

from trainer.cost.anatomy import Anatomy
from trainer.cost.layer_memory import FLOAT, Format
from trainer.cost.memory import Remade
from trainer.cost.microbatch import MicroBatch
from trainer.cost.operations import operations_of, small_bytes, total


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card does in a second of a training step."""

    products: float
    """Operations of matrix products in bfloat16."""
    attention: float
    """Operations of flash-attention, forward and backward."""
    small: float
    """Bytes of `small_bytes`: norms, gates, rotary embedding, copies, the optimizer, and gaps between kernels."""
    exchange: float
    """Bytes that a card sends to the others; not measured."""

    def scaled(self, *, peak: float, bandwidth: float) -> "Rates":
        """Of another card, by the ratios of published peak operations and memory bandwidth; not measured."""
        return Rates(self.products * peak, self.attention * peak, self.small * bandwidth, self.exchange)


# From one step of twenty samples of 2,000 tokens with random weights of the 4B (`benchmarks/results/performance/
# gpu_last6_lora.json`: kernels of its profile by kind, and what is left of its 2.105 s); a test makes them again.
H200 = Rates(products=705.8e12, attention=233.8e12, small=0.991e12, exchange=300e9)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, by what its maker says of it."""

    name: str
    """As the driver's name has it."""
    peak: float
    """Dense operations a second in bfloat16."""
    bandwidth: float
    """Bytes of memory a second."""
    memory: int
    """Bytes."""

    @property
    def rates(self) -> Rates:
        """Measured on an H200, scaled for the others."""
        of = CARDS[0]
        return H200.scaled(peak=self.peak / of.peak, bandwidth=self.bandwidth / of.bandwidth)

    @property
    def is_measured(self) -> bool:
        """Whether its rates are."""
        return self == CARDS[0]


CARDS = (
    Card("H200", 989e12, 4.8e12, 143_771 * 2**20),
    Card("H100", 989e12, 3.35e12, 81_559 * 2**20),
    Card("A100", 312e12, 2.04e12, 81_920 * 2**20),
)
"""The first is the one that was measured; the others are their makers' figures of the SXM form with 80 GB."""


def card_of(name: str) -> Card | None:
    """The card that a driver's name means; None where nothing is known of it."""
    return next((card for card in CARDS if card.name in name), None)


def busy_seconds(of: Anatomy, batch: MicroBatch, remade: Remade, form: Format, rates: Rates) -> dict[str, float]:
    """Seconds of a micro-batch on one GPU, by what is done.

    Args:
        of: the model.
        batch: the micro-batch.
        remade: which layers run forward again.
        form: number format.
        rates: of the card.
    """
    done = total(operations_of(of, batch, remade))
    return {
        "products": done.products / rates.products,
        "attention": done.attention / rates.attention,
        "small operations": small_bytes(of, batch, remade, form) / rates.small,
    }


def exchanged(of: Anatomy, *, ranks: int, zero: int = 0, micro_batches: int = 1) -> float:
    """Bytes that each rank sends in a step: a ring passes every gradient on twice, ZeRO-2 once a micro-batch and once.

    Rajbhandari et al. 2020, arXiv:1910.02054, section 7.
    """
    share = of.all_trained * FLOAT * (ranks - 1) / ranks
    return share * (micro_batches + 1 if zero == 2 else 2)

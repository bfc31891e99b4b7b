"""Seconds of a step: rates from one recorded step, held to the others."""

import pytest

from benchmarks.scaling import anatomy, calibrated, h200_steps, seconds
from trainer.cost.duration import CARDS, H200, card_of, exchanged


def test_the_rates_are_those_of_the_recorded_profile() -> None:
    """Products, attention, and the rest of a step."""
    found = calibrated()
    assert found.products == pytest.approx(H200.products, rel=1e-3)
    assert found.attention == pytest.approx(H200.attention, rel=1e-3)
    assert found.small == pytest.approx(H200.small, rel=1e-3)


@pytest.mark.parametrize(("what", "measured", "computed"), list(h200_steps()), ids=lambda value: str(value)[:30])
def test_recorded_steps_take_what_is_computed(what: str, measured: float, computed: float) -> None:
    """Within 5 %: the first made the rates, three did not."""
    assert computed == pytest.approx(measured, rel=0.05), what


def test_another_card_is_scaled_by_what_its_maker_says() -> None:
    """Not measured, and it says so."""
    a100 = card_of("NVIDIA A100-SXM4-80GB")
    assert a100 is not None and not a100.is_measured and CARDS[0].is_measured
    assert a100.rates.products == pytest.approx(H200.products * 312 / 989)
    assert a100.rates.small == pytest.approx(H200.small * 2.04 / 4.8)
    assert card_of("NVIDIA GeForce GTX 1080") is None
    assert seconds("4b", "last6_lora", 1, 1, a100) > seconds("4b", "last6_lora", 1, 1)


def test_ranks_exchange_gradients() -> None:
    """One rank nothing; a ring nearly twice the gradients; ZeRO-2 once a micro-batch, and the weights once."""
    of = anatomy("pocket", "last6_lora")
    n = 902_976 * 4
    assert exchanged(of, ranks=1) == 0
    assert exchanged(of, ranks=8) == 2 * n * 7 / 8
    assert exchanged(of, ranks=8, zero=2, micro_batches=2) == 3 * n * 7 / 8

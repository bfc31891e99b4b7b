"""One seed for each purpose, so that what one part of a run draws never shifts what another part draws."""

import hashlib


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: equal arguments give equal streams, different ones independent streams."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

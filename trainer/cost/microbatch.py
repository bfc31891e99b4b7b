"""What one rank runs forward at once, in numbers: samples, patches, supervised tokens, words that samples share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that lie end to end."""

    lengths: tuple[int, ...]
    """Tokens of each sample."""
    images: tuple[int, ...]
    """Patches of each image."""
    supervised: int
    """Tokens with loss."""
    shared: int = 0
    """Words with which all samples begin, and which are computed once."""

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        """Of all images."""
        return sum(self.images)

    @property
    def behind(self) -> int:
        """Tokens behind the shared words."""
        return self.tokens - len(self.lengths) * self.shared

    def rows(self, *, words: bool) -> int:
        """Rows of a layer of the language model.

        Args:
            words: whether the shared words are among them: from the first layer that trains.
        """
        return self.behind + (self.shared if words else 0)

    def pairs(self, *, words: bool) -> float:
        """Pairs of rows that see each other in a layer of the language model: causal, within each sample."""
        own = [length - self.shared for length in self.lengths]
        pairs = sum(n * n / 2 + n * self.shared for n in own)
        return pairs + (self.shared**2 / 2 if words else 0)

    @property
    def image_pairs(self) -> float:
        """Pairs of patches that see each other: all of an image."""
        return float(sum(n * n for n in self.images))

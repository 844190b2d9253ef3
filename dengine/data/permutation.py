"""A permutation of n numbers that is computed at the positions asked for, and never stored.

A chain of invertible operations permutes the numbers of k bits (n <= 2^k). A result of n or more goes through the chain
again until it is below n ("cycle walking"), which takes less than one more turn on average.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Permutation"]

# Enough for positions, neighbours and distances to be distributed as in a random permutation: few numbers have few
# bits to mix, and need more.
_ROUNDS, _ROUNDS_OF_FEW = 5, 10
_FEW_BITS = 6


class Permutation:
    """The numbers below `size` in an order that `(seed, epoch)` determine. O(1) memory and time to set up."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self._size = size
        self._bits = max(1, (size - 1).bit_length())
        # 32-bit arithmetic is twice as fast, and enough for four thousand million samples.
        self._dtype = np.dtype(np.uint32 if self._bits <= 32 else np.uint64)
        generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), epoch]))
        num_rounds = _ROUNDS if self._bits > _FEW_BITS else _ROUNDS_OF_FEW
        keys = generator.integers(0, 2**self._bits, size=(num_rounds, 2), dtype=np.uint64, endpoint=False)
        self._rounds = [
            (self._dtype.type(multiplier | 1), self._dtype.type(summand), self._dtype.type(shift))
            for (multiplier, summand), shift in zip(keys.tolist(), self._shifts(num_rounds), strict=True)
        ]
        self._mask = self._dtype.type(2**self._bits - 1)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger]:
        """The numbers at `positions`, which must lie in [0, size). Shapes: (N,) to (N,)."""
        numbers = self._once(positions.astype(self._dtype))
        outside = np.flatnonzero(numbers >= self._size)
        while outside.size:
            numbers[outside] = walked = self._once(numbers[outside])
            outside = outside[walked >= self._size]
        return numbers

    def _once(self, numbers: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        for multiplier, summand, shift in self._rounds:
            numbers *= multiplier  # odd, hence a permutation modulo 2^k
            numbers += summand
            numbers &= self._mask
            numbers ^= numbers >> shift  # brings the well mixed high bits down
        return numbers

    def _shifts(self, num_rounds: int) -> Iterator[int]:
        """The shifts: half the bits and numbers around that, in turn. One shift alone leaves patterns."""
        half = (self._bits + 1) // 2
        for turn in range(num_rounds):
            yield max(1, half + (0, -1, 1)[turn % 3]) if self._bits > 2 else 1

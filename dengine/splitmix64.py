"""A mixer of 64 bits, for seeds and for digests of tensors: similar inputs give unrelated outputs.

Source: the splitmix64 generator (Steele, Lea and Flood 2014).
"""

import torch

__all__ = ["derived_seed", "mixed"]

_MASK = 2**64 - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GAMMA_INT64, _FIRST_INT64, _SECOND_INT64 = (each - 2**64 for each in (_GAMMA, _FIRST, _SECOND))


def derived_seed(*numbers: int) -> int:
    """A seed of 64 bits from `numbers` and their order, the same on every machine."""
    seed = 0
    for number in numbers:
        seed = (seed * _SECOND + (number & _MASK) + _GAMMA) & _MASK
        seed = ((seed ^ (seed >> 30)) * _FIRST) & _MASK
        seed = ((seed ^ (seed >> 27)) * _SECOND) & _MASK
        seed ^= seed >> 31
    return seed


def mixed(words: torch.Tensor) -> torch.Tensor:
    """`words`, each mixed over all of its 64 bits, one to one; int64, on the same device.

    Not the numbers of `derived_seed`: a shift of int64 to the right brings in the sign.
    """
    words = words * _GAMMA_INT64
    words = (words ^ (words >> 30)) * _FIRST_INT64
    words = (words ^ (words >> 27)) * _SECOND_INT64
    return words ^ (words >> 31)

"""Find the random number generators that an object keeps in its attributes, to save, seed and restore them."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from dengine.data.seeding import kept_generators, seed_generators
from dengine.splitmix64 import derived_seed

__all__ = ["attributes_of", "generators_of", "seeded", "states_digest"]


def attributes_of(part: object) -> dict[str, Any]:
    """The attributes of `part` by name; none for an object without a `__dict__`."""
    attributes = getattr(part, "__dict__", {})
    return attributes if isinstance(attributes, dict) else {}


def generators_of(part: object) -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """The generators in the attributes of `part` by name: the state of each, and the function that sets it."""
    found: dict[str, tuple[Any, Callable[[Any], None]]] = {}
    for name, value in attributes_of(part).items():
        if isinstance(value, torch.Generator):
            found[name] = value.get_state(), _setter_of_torch(value)
        elif type(value) is random.Random:
            found[name] = json.dumps(value.getstate()), _setter_of_python(value)
        elif isinstance(value, (np.random.Generator, np.random.RandomState)):
            bits = _bit_generator(value)
            found[name] = json.dumps(bits.state, default=np.ndarray.tolist), _setter_of_numpy(bits)
    return found


def _setter_of_torch(generator: torch.Generator) -> Callable[[torch.Tensor], None]:
    def set_state(state: torch.Tensor) -> None:
        generator.set_state(state)

    return set_state


def _setter_of_python(generator: random.Random) -> Callable[[str], None]:
    def set_state(state: str) -> None:
        version, numbers, gauss = json.loads(state)
        generator.setstate((version, tuple(numbers), gauss))

    return set_state


def _setter_of_numpy(bits: Any) -> Callable[[str], None]:
    def set_state(state: str) -> None:
        bits.state = json.loads(state)

    return set_state


def states_digest(parts: Sequence[object]) -> str:
    """A digest of the states of the generators in the attributes of `parts`; "" without any."""
    states = [state for part in parts for state, _ in generators_of(part).values()]
    if not states:
        return ""
    texts = [state if isinstance(state, str) else state.numpy().tobytes().hex() for state in states]
    return blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


@contextmanager
def seeded(parts: Sequence[object], seed: int) -> Iterator[None]:
    """A context in which everything that `parts` may draw from is seeded by `seed`, and is as before afterwards.

    These are the global generators and those in the attributes of `parts`.
    """
    before = [setter_and_state for part in parts for setter_and_state in generators_of(part).values()]
    with kept_generators():
        seed_generators(seed)
        for number, part in enumerate(parts):
            for name, value in attributes_of(part).items():
                _seed(value, derived_seed(seed, number, *name.encode()))
        try:
            yield
        finally:
            for state, set_state in before:
                set_state(state)


def _seed(value: object, seed: int) -> None:
    if isinstance(value, torch.Generator):
        value.manual_seed(seed >> 1)  # which takes 63 bits
    elif type(value) is random.Random:
        value.seed(seed)
    elif isinstance(value, (np.random.Generator, np.random.RandomState)):
        bits = _bit_generator(value)
        bits.state = type(bits)(seed).state


def _bit_generator(value: "np.random.Generator | np.random.RandomState") -> Any:
    return value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator

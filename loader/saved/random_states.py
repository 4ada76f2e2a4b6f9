"""Knows how random states are saved: the names that frameworks give them, and the numbers that generators can take.

Pure. Generators of torch and NumPy read their memory at the position that a state names: some do not compare it with
its length, so that it is compared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES: Mapping[str, str] = {
    "python": "python",
    "numpy": "numpy",
    "torch": "torch",
    "cuda": "cuda",
    # transformers
    "cpu": "torch",
    # accelerate
    "random_state": "python",
    "numpy_random_seed": "numpy",
    "torch_manual_seed": "torch",
    "torch_cuda_manual_seed": "cuda",
    # verl
    "random": "python",
    # Megatron
    "random_rng_state": "python",
    "np_rng_state": "numpy",
    "torch_rng_state": "torch",
    "cuda_rng_state": "cuda",
}
"""Keys of a rank's random states to the generators that they are of."""

MT_WORDS = 624
"""Words in a state of the Mersenne Twister, which Python, NumPy and torch's CPU generator use."""
PHILOX_BUFFER = 4
TORCH_BYTES = 5056
"""Length of a state of torch's CPU generator."""
CUDA_BYTES = (16, 8)
"""Lengths of a state of a CUDA generator: seed and offset, or the seed alone."""


def are_random_states(value: Any) -> bool:
    """Whether `value` is one rank's random states: a mapping with a key of `NAMES`, whatever else it has."""
    return isinstance(value, Mapping) and any(isinstance(key, str) and key in NAMES for key in value)


def check_position(position: Any) -> int:
    """`position` in a Mersenne Twister's words. Raises `ValueError` where it is none."""
    if isinstance(position, bool) or not hasattr(position, "__index__"):
        raise ValueError(f"its position is a {type(position).__name__}, expected an int")
    found = int(position)
    if not 0 <= found <= MT_WORDS:
        raise ValueError(f"its position is {found}, expected 0 to {MT_WORDS}")
    return found


def check_generator_state(state: Mapping[Any, Any]) -> None:
    """Raises `ValueError` where the ``state`` of a NumPy bit generator names a position outside of its memory."""
    inner = state.get("state")
    if isinstance(inner, Mapping) and "pos" in inner:
        check_position(inner["pos"])
        if not hasattr(inner.get("key"), "__len__") or len(inner["key"]) != MT_WORDS:
            raise ValueError(f"its key is not of {MT_WORDS} words")
    if "buffer_pos" in state:
        position = state["buffer_pos"]
        if not hasattr(position, "__index__") or not 0 <= int(position) <= PHILOX_BUFFER:
            raise ValueError(f"its buffer_pos is {position!r}, expected 0 to {PHILOX_BUFFER}")


def check_twister(left: int, following: int) -> None:
    """Raises `ValueError` unless torch's CPU generator, which will read `left` - 1 words from the one at `following`
    on before it makes new ones, finds them in its memory."""
    if not (1 <= left <= MT_WORDS and following >= 0 and left + following <= MT_WORDS + 1):
        raise ValueError(
            f"it has {left} words left from word {following} on, expected at most {MT_WORDS} in all"
        )

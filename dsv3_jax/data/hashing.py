"""Random numbers that are a pure function of integers, the same on every machine and NumPy version.

NumPy's generators may change their streams between versions, and a saved position would then point at
other text. SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators")
is a dozen operations and will not change.
"""

import numpy as np
from jaxtyping import UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def random_keys(n: int, *words: int) -> UInt64[np.ndarray, "n"]:
    """`n` distinct 64-bit keys from the non-negative integers `words` (a seed, an epoch, a purpose)."""
    return keys_at(np.arange(n, dtype=np.uint64), *words)


def keys_at(index: np.ndarray, *words: int) -> UInt64[np.ndarray, "n"]:
    """The keys of `random_keys` at the positions `index`."""
    state = np.zeros(1, np.uint64)
    for word in words:
        # Words wider than 64 bits are legal seeds in Python; only their low 64 bits count.
        state = _mix(state + np.uint64(word % 2**64) + _GAMMA)
    return _mix(state + (index.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def random_order(n: int, *words: int) -> np.ndarray:
    """A permutation of `range(n)`, int64 [n]."""
    return np.argsort(random_keys(n, *words), kind="stable")


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection on 64 bits: equal keys can't come from different positions."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

"""The keys that decide the order of everything: SplitMix64, and uniform."""

from collections import Counter
from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data.hashing import keys_at, random_keys, random_order

_MASK = 2**64 - 1


def _splitmix64(state: int) -> int:
    """The published generator, in Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_published_outputs():
    # The first outputs of SplitMix64 from state 0, as its authors' java.util.SplittableRandom gives them.
    assert [int(k) for k in random_keys(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 2**70), max_size=4), st.integers(0, 50))
def test_keys_are_splitmix64_chained_over_the_words(words, index):
    state = 0
    for word in words:
        state = _splitmix64((state + word) & _MASK)
    expected = _splitmix64((state + index * 0x9E3779B97F4A7C15) & _MASK)
    assert int(random_keys(index + 1, *words)[index]) == expected
    assert int(keys_at(np.array([index]), *words)[0]) == expected


def test_orders_are_uniform():
    n = 6000
    seen = Counter(tuple(int(i) for i in random_order(4, 7, epoch)) for epoch in range(n))
    expected = n / 24
    chi2 = sum((seen[p] - expected) ** 2 / expected for p in permutations(range(4)))
    assert chi2 < 60  # 23 degrees of freedom: a fair shuffle is above this once in 30,000 times.

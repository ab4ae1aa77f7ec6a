"""States to save, of which every value says which step it is of."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class State(NamedTuple):
    params: dict
    router: dict
    count: jax.Array


def make_state(step: int) -> State:
    """A state whose every value says which step it is of."""
    w = np.random.default_rng(step).standard_normal((300, 100)).astype(np.float32)
    params = {"embed": {"embedding": jnp.asarray(w)}, "norm": {"scale": jnp.full((7,), step, jnp.bfloat16)}}
    return State(params, {}, jnp.int32(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def kept(directory: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())

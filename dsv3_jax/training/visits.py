"""State in host memory that visits the device block by block.

The link to the host carries both directions at once, but what XLA reads of an array waits for what it writes
there, and one turn of a loop waits for the last. So in each turn blocks of several arrays go in a chain:

    a arrives | it leaves, b arrives | it leaves, a's next arrives | it leaves, b's next arrives | ...
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int

Index = Int[Array, ""] | int
State = Any  # A tree of arrays that a loop updates.
BLOCK_BYTES = 64 << 20  # At most so much visits at once, where an array can be cut so.


def blocks(x: Array, turns: int, shared: bool) -> int:
    """Blocks of a turn's part of `x`, along its second axis; 1 where devices may share that axis.

    Of one turn there are none: without a loop XLA copies parts by kernels, and only whole arrays by engines.
    """
    if x.ndim < 2 or shared or turns == 1:
        return 1
    size = x.size * x.dtype.itemsize / turns
    fits = (n for n in range(1, x.shape[1] + 1) if x.shape[1] % n == 0 and size / n <= BLOCK_BYTES)
    return next(fits, x.shape[1])


def cut(x: Array, n: int) -> Array:
    """`x` with `n` blocks of its second axis in the first: copy engines take what one index says."""
    return x if n == 1 else x.reshape(x.shape[0] * n, x.shape[1] // n, *x.shape[2:])


class Turn:
    """One turn of `turns`: the `index`-th part of arrays along their first axis, in blocks."""

    def __init__(self, index: Index, turns: int) -> None:
        self.index, self.turns = index, turns
        self._ready: Array | None = None

    def take(self, x: Array, block: int = 0, of: int = 1) -> Array:
        """A block of this turn's part of `x`."""
        if self.turns * of == 1:
            return x
        rows = len(x) // (self.turns * of)
        return lax.dynamic_slice_in_dim(x, (self.index * of + block) * rows, rows)

    def put(self, x: Array, new: Array, block: int = 0, of: int = 1) -> Array:
        """`x` with that block replaced."""
        if self.turns * of == 1:
            return new
        return lax.dynamic_update_slice_in_dim(x, new, (self.index * of + block) * len(new), 0)

    def arrive(self, x: Array, block: int = 0, of: int = 1) -> Array:
        """A block of `x`, in host memory, on the device. It sets out when the last one is ready to leave."""
        if self._ready is not None:  # Else XLA would wait for both, and update them together.
            self._ready, x = lax.optimization_barrier((self._ready, x))
        return jax.device_put(self.take(x, block, of), jax.memory.Space.Device)

    def leave(self, x: Array, new: Array, block: int = 0, of: int = 1) -> Array:
        """`x`, in host memory, with that block replaced by `new`, which is on the device."""
        self._ready = new
        return self.put(x, jax.device_put(new, jax.memory.Space.Host), block, of)


def in_turns(turns: int, state: State, visit: Callable[[Turn, State], State]) -> State:
    """`state` after `visit` of every turn."""
    if turns == 1:
        return visit(Turn(0, 1), state)
    return lax.fori_loop(0, turns, lambda i, state: visit(Turn(i, turns), state), state)

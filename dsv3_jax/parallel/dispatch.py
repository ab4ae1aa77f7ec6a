"""The pair `dispatch` and `combine`: tokens to their experts' rows and back, on one device or over many.

A route (`Dispatch` here, `exchange.Exchange` between devices) says where every copy of a token goes. It
has two linear maps, each the transpose of the other: `spread` makes rows of tokens (`send` takes them to the
experts' device, `expand` makes the rows there), `collect` sums rows into tokens. So dispatch's gradient is
a combine, and combine's a dispatch. All are gathers: a scatter-add would serialise on most hardware.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


class Dispatch(NamedTuple):
    """How copies are laid out by expert; a copy is one of the `tokens * top_k` (token, choice) pairs."""

    order: Int[Array, " copies"]  # The copy in each sorted row.
    row: Int[Array, "tokens top_k"]  # The sorted row of each copy: the inverse of `order`.
    group_sizes: Int[Array, " experts"]

    def send(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """The tokens that reach this device: all, as they are."""
        return x

    def expand(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """A row for every copy, sorted by expert, of tokens along `axis`."""
        return take(x, self.order // self.row.shape[1], axis)

    spread = expand

    def collect(self, rows: Float[Array, "copies d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's copies, accumulated in float32."""
        return rows[self.row].astype(jnp.float32).sum(1).astype(rows.dtype)

    def spread_gates(self, gates: Float[Array, "tokens top_k"]) -> Float[Array, " copies"]:
        """The gate of each sorted row."""
        return gates.reshape(-1)[self.order]

    def collect_gates(self, rows: Float[Array, " copies"]) -> Float[Array, "tokens top_k"]:
        """The transpose of `spread_gates`."""
        return rows[self.row]


def plan(indices: Int[Array, "tokens top_k"], n_experts: int) -> Dispatch:
    """Sorts the copies by expert, stably: a token's order within an expert is its order in the batch."""
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1)
    return Dispatch(order, row.reshape(indices.shape), sizes)


def take(x: Shaped[Array, "..."], index: Int[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """`jnp.take` of indices that exist; rows of 8-bit numbers move four at a time where the width allows."""
    if axis or x.dtype.itemsize > 1 or x.ndim != 2 or x.shape[1] % 4:
        return jnp.take(x, index, axis=axis, mode="clip")
    words = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 4), jnp.uint32)[index]
    return jax.lax.bitcast_convert_type(words, x.dtype).reshape(*index.shape, x.shape[1])


@jax.custom_vjp
def dispatch(x: Float[Array, "tokens d"], to: Any) -> Float[Array, "copies d"]:
    """A row for every copy, sorted by expert."""
    return to.spread(x)


@jax.custom_vjp
def combine(rows: Float[Array, "copies d"], to: Any) -> Float[Array, "tokens d"]:
    """The sum of each token's copies, accumulated in float32."""
    return to.collect(rows)


@jax.custom_vjp
def sort_gates(gates: Float[Array, "tokens top_k"], to: Any) -> Float[Array, " copies"]:
    """The gate of each sorted row."""
    return to.spread_gates(gates)


dispatch.defvjp(lambda x, to: (to.spread(x), to), lambda to, drows: (to.collect(drows), None))
combine.defvjp(lambda rows, to: (to.collect(rows), to), lambda to, dy: (to.spread(dy), None))
sort_gates.defvjp(
    lambda gates, to: (to.spread_gates(gates), to), lambda to, drows: (to.collect_gates(drows), None)
)

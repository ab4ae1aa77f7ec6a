"""State in host memory that visits the device part by part.

The link to the host carries both directions at once, but what XLA reads of an array waits for what it writes
there. So arrays visit in two lanes that take turns:

    lead 0 arrives | it leaves, trail 0 arrives | it leaves, lead 1 arrives | it leaves, trail 1 arrives | ...
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int

Tree = Any  # Of arrays.
Index = Int[Array, ""] | int


def part(tree: Tree, i: Index, count: int) -> Tree:
    """The i-th of `count` parts of every array, along the first axis."""

    def cut(x: Array) -> Array:
        rows = x.shape[0] // count
        return lax.dynamic_slice_in_dim(x, i * rows, rows)

    return tree if count == 1 else jax.tree.map(cut, tree)


def with_part(tree: Tree, new: Tree, i: Index) -> Tree:
    """`tree` with `new` in place of its i-th part."""

    def put(x: Array, y: Array) -> Array:
        return y if x.shape == y.shape else lax.dynamic_update_slice_in_dim(x, y, i * y.shape[0], 0)

    return jax.tree.map(put, tree, new)


def to_device(tree: Tree) -> Tree:
    """The arrays in device memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def to_host(tree: Tree) -> Tree:
    """The arrays in host memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def in_turns(
    count: int,
    lead: Tree,
    trail: Tree,
    kept: Tree,
    on_lead: Callable[[Index, Tree, Tree], Tree],
    on_trail: Callable[[Index, Tree, Tree, Tree], tuple[Tree, Tree]],
) -> tuple[Tree, Tree, Tree]:
    """Updates `lead` and `trail`, which are in host memory and stay there, in `count` visits.

    Args:
      count: visits; divides the length of every array's first axis.
      lead: the arrays of one lane.
      trail: the arrays of the other; best if a visit is as many bytes.
      kept: on the device all the time.
      on_lead: `(i, kept, the i-th part of lead) -> that part, new`.
      on_trail: `(i, kept, the i-th part of lead as it was, that of trail) -> (trail's part, kept), new`.

    Returns:
      `(lead, trail, kept)` after the last visit.
    """

    def visit(i: Index, lead: Tree, trail: Tree, kept: Tree, here: Tree) -> tuple[Tree, Tree, Tree]:
        new = on_lead(i, kept, here)
        # Trail sets out once lead is ready to leave: else XLA would wait for both, and update them at once.
        new, trail = lax.optimization_barrier((new, trail))
        arrived = to_device(part(trail, i, count))
        lead = with_part(lead, to_host(new), i)
        new, kept = on_trail(i, kept, here, arrived)
        return lead, with_part(trail, to_host(new), i), kept

    def turn(i: Index, state: tuple[Tree, Tree, Tree, Tree]) -> tuple[Tree, Tree, Tree, Tree]:
        lead, trail, kept = visit(i, *state)
        return lead, trail, kept, to_device(part(lead, i + 1, count))

    state = lead, trail, kept, to_device(part(lead, 0, count))
    if count > 1:
        state = lax.fori_loop(0, count - 1, turn, state)
    return visit(count - 1, *state)

"""Operands inside `shard_map`: JAX tracks which mesh axes a value differs along, and kernels must say it."""

import jax
from jax import lax


def together(*operands):
    """The operands, every one varying along all the mesh axes that any of them varies along.

    Gradients of what was the same everywhere are then summed over the mesh, as they must be. Outside
    `shard_map` nothing changes.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    return tuple(
        lax.pcast(x, tuple(sorted(missing)), to="varying")
        if (missing := axes - jax.typeof(x).manual_axis_type.varying)
        else x
        for x in operands
    )


def like(operand, results):
    """The results, varying as `operand` does: what comes out of a kernel has forgotten it."""
    return jax.tree.map(lambda x: together(x, operand)[0], results)

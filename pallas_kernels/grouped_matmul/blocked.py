"""`grouped_matmul` in plain JAX at a cost in proportion to the rows: blocks of rows, group by group.

Where a group has a few rows on average (a decode step), the first rows of all groups are one batched product,
and only what the larger groups have beyond them is left to loops, which would spend their time on copies of
the matrices.

Two nested loops with run-time bounds, over the groups and over the blocks of one group. A block may
run past its group's end: the product of the next group overwrites those rows, since groups are
visited in order, and the weight gradient masks them. Not differentiated through: the op's
`custom_vjp` calls `forward` and `wgrad`.
"""

import jax.numpy as jnp
from jax import lax


def unsupported(lhs, rhs, transpose_rhs) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs, transpose_rhs
    return None


def block_rows(rows: int, groups: int) -> int:
    """Rows a block: about half a mean group, a power of two in [8, 256].

    Larger blocks make the products efficient, and waste half a block a group.
    """
    half_mean = max(1, rows // (2 * groups))
    return min(256, max(8, 1 << (half_mean - 1).bit_length()))


FEW = 8  # Rows of a group in the batched product, at most.


def _bounds(group_sizes):
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends


def forward(lhs, rhs, group_sizes, *, transpose_rhs, out_dtype):
    """`out[r] = lhs[r] @ rhs[group of r]`."""
    twice_the_mean = -(-2 * lhs.shape[0] // rhs.shape[0])
    if twice_the_mean > FEW:
        return _loops(lhs, rhs, group_sizes, transpose_rhs, out_dtype)
    return _batched(lhs, rhs, group_sizes, max(2, twice_the_mean), transpose_rhs, out_dtype)


def _batched(lhs, rhs, group_sizes, few, transpose_rhs, out_dtype):
    """The first `few` rows of all groups at once, which are most of them, and then the rest."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    starts, ends = _bounds(group_sizes)
    padded = jnp.take(lhs, starts[:, None] + jnp.arange(few), axis=0, mode="clip")
    contract = (((2,), (2 if transpose_rhs else 1,)), ((0,), (0,)))
    product = lax.dot_general(padded, rhs, contract, preferred_element_type=jnp.float32)
    row = jnp.arange(rows)
    group = jnp.minimum(jnp.sum(row[:, None] >= ends, axis=1), groups - 1)
    out = product[group, jnp.minimum(row - starts[group], few - 1)].astype(out_dtype)
    out = _rest(out, lhs, rhs, group_sizes, few, transpose_rhs)
    return jnp.where(row[:, None] < ends[-1], out, 0)


def _rest(out, lhs, rhs, group_sizes, few, transpose_rhs):
    """`out` with the products of the rows that each group has beyond its first `few`."""
    rows, block = lhs.shape[0], FEW
    starts, ends = _bounds(group_sizes)
    padded = jnp.pad(lhs, ((0, block), (0, 0)))
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    largest = jnp.argsort(-group_sizes)

    def one_group(i, out):
        g = largest[i]
        weight = lax.dynamic_index_in_dim(rhs, g, keepdims=False)

        def one_block(i, out):
            start = starts[g] + few + i * block
            left = lax.dynamic_slice_in_dim(padded, start, block)
            product = lax.dot_general(left, weight, contract, preferred_element_type=jnp.float32)
            ours = start + jnp.arange(block)[:, None] < ends[g]
            found = jnp.where(ours, product.astype(out.dtype), lax.dynamic_slice_in_dim(out, start, block))
            return lax.dynamic_update_slice_in_dim(out, found, start, 0)

        return lax.fori_loop(0, -(-(group_sizes[g] - few) // block), one_block, out)

    out = jnp.pad(out, ((0, block), (0, 0)))
    return lax.fori_loop(0, jnp.sum(group_sizes > few), one_group, out)[:rows]


def _loops(lhs, rhs, group_sizes, transpose_rhs, out_dtype):
    rows = lhs.shape[0]
    groups, n = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    block = block_rows(rows, groups)
    starts, ends = _bounds(group_sizes)
    padded = jnp.pad(lhs, ((0, block), (0, 0)))
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def one_group(g, out):
        weight = lax.dynamic_index_in_dim(rhs, g, keepdims=False)

        def one_block(i, out):
            start = starts[g] + i * block
            left = lax.dynamic_slice_in_dim(padded, start, block)
            product = lax.dot_general(left, weight, contract, preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(out, product.astype(out_dtype), start, 0)

        return lax.fori_loop(0, -(-group_sizes[g] // block), one_block, out)

    out = lax.fori_loop(0, groups, one_group, jnp.zeros_like(lhs, out_dtype, shape=(rows + block, n)))[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out, 0)


def wgrad(lhs, dout, group_sizes, *, out_dtype):
    """`out[g] = lhs[rows of g].T @ dout[rows of g]`."""
    rows, k = lhs.shape
    n, groups = dout.shape[1], group_sizes.shape[0]
    block = block_rows(rows, groups)
    starts, ends = _bounds(group_sizes)
    left_rows = jnp.pad(lhs, ((0, block), (0, 0)))
    right_rows = jnp.pad(dout, ((0, block), (0, 0)))

    def one_group(g, out):
        def one_block(i):
            start = starts[g] + i * block
            left = lax.dynamic_slice_in_dim(left_rows, start, block)
            right = lax.dynamic_slice_in_dim(right_rows, start, block)
            # In both: what belongs to the next group may be infinite, and zero times that is NaN.
            ours = start + jnp.arange(block)[:, None] < ends[g]
            left, right = jnp.where(ours, left, 0), jnp.where(ours, right, 0)
            contract = (((0,), (0,)), ((), ()))
            return lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)

        # The first block needs no sum, and with many groups it is the only one.
        blocks = -(-group_sizes[g] // block)
        total = lax.fori_loop(1, blocks, lambda i, total: total + one_block(i), one_block(0))
        return lax.dynamic_update_index_in_dim(out, total.astype(out_dtype), g, 0)

    return lax.fori_loop(0, groups, one_group, jnp.zeros_like(lhs, out_dtype, shape=(groups, k, n)))

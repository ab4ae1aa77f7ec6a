"""`grouped_matmul` for TPU: the Megablox kernels that JAX ships (Pallas Mosaic TPU), at our contract.

A tile that two groups share is visited once for each, and rows of the other group are masked: on store
in the forward product, in both operands in the weight gradient. What Megablox leaves undefined, rows past
the sum of the sizes, is set to zero here.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels import implementations

# Rows, contraction and columns of a tile: with two buffers of each operand, 10 to 12 MB of VMEM.
TILES = {2: (512, 1024, 1024), 4: (512, 1024, 512)}  # By bytes of an operand's element.
_ALIGN = 128


def unsupported(lhs, rhs, transpose_rhs) -> str | None:
    """Why this implementation cannot run the call, or None."""
    del transpose_rhs
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}: take 'blocked' or 'mosaic_gpu'"
    if lhs.dtype != rhs.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return f"lhs {lhs.dtype} and rhs {rhs.dtype}: cast both to bfloat16 or both to float32"
    return None


def _padded(x, axis: int, multiple: int):
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _tiles(lhs, n: int) -> tuple[int, int, int]:
    sizes = (-(-size // _ALIGN) * _ALIGN for size in (*lhs.shape, n))
    rows, k, n = (min(tile, size) for tile, size in zip(TILES[lhs.dtype.itemsize], sizes, strict=True))
    return rows, k, n


def forward(lhs, rhs, group_sizes, *, transpose_rhs, out_dtype, interpret: bool = False):
    """`out[r] = lhs[r] @ rhs[group of r]`; rows past the sum of the sizes are zero."""
    rows = lhs.shape[0]
    tiles = _tiles(lhs, rhs.shape[1 if transpose_rhs else 2])
    out = gmm(
        _padded(lhs, 0, tiles[0]),
        rhs,
        group_sizes.astype(jnp.int32),
        preferred_element_type=out_dtype,
        tiling=tiles,
        transpose_rhs=transpose_rhs,
        interpret=interpret,
    )
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(group_sizes), out[:rows], 0)


def wgrad(lhs, dout, group_sizes, *, out_dtype, interpret: bool = False):
    """`out[g] = lhs[rows of g].T @ dout[rows of g]`; zero for an empty group."""
    tiles = _tiles(lhs, dout.shape[1])
    return tgmm(
        _padded(lhs, 0, tiles[0]).T,
        _padded(dout, 0, tiles[0]),
        group_sizes.astype(jnp.int32),
        preferred_element_type=out_dtype,
        tiling=tiles,
        interpret=interpret,
    )

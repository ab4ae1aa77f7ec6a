"""`fp8_matmul` for TPU, in Pallas Mosaic TPU: row-scaled by block-scaled operands.

A tile of the result takes the whole contraction, 128 at a time: one product on the matrix unit, summed in
float32, then scaled and added. TPU7x multiplies E4M3 as it is. Older chips do not: there FP8 is how operands
are stored and moved, and the kernel widens them to bfloat16, which holds every FP8 number exactly. Either
way the products are exact.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations
from pallas_kernels.fp8_quantize import TILE

ROWS, COLUMNS = 256, 256  # Of a tile of the result.
_ALIGN = 32  # Rows of FP8 in one register tile.
_VMEM_BYTES = 48 << 20
_DEEPEST = 16384  # Contraction: 8 MB an operand's tile, and two tiles of each.


def native() -> bool:
    """Whether the chip that is compiled for multiplies E4M3: TPU7x and later."""
    return pltpu.get_tpu_info().generation >= 7


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}: take 'reference' or 'mosaic_gpu'"
    n, k = rhs.values.shape
    if rhs.scales.shape != (-(-n // TILE), -(-k // TILE)):
        return "rhs has a scale for each row: take 'bf16'"
    if k > _DEEPEST:
        return f"a contraction of {k}, more than {_DEEPEST}: take 'bf16'"
    return None


def matmul(lhs, rhs, *, out_dtype, multiply_fp8: bool | None = None, interpret: bool = False):
    """`lhs @ rhs.T`; `multiply_fp8` overrides what the chip is known to do."""
    multiply_fp8 = native() if multiply_fp8 is None else multiply_fp8
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    rows, columns = min(ROWS, m + -m % _ALIGN), min(COLUMNS, n + -n % TILE)
    steps = -(-k // TILE)
    depth = (0, -k % TILE)
    left = jnp.pad(lhs.values, ((0, -m % rows), depth))
    right = jnp.pad(rhs.values, ((0, -n % columns), depth))
    by_row = jnp.pad(lhs.scales.T, ((0, -m % rows), (0, 0)))
    by_block = jnp.pad(rhs.scales, ((0, right.shape[0] // TILE - rhs.scales.shape[0]), (0, 0)))
    grid = left.shape[0] // rows, right.shape[0] // columns
    out = pl.pallas_call(
        functools.partial(_kernel, steps=steps, multiply_fp8=multiply_fp8),
        out_shape=jax.ShapeDtypeStruct((left.shape[0], right.shape[0]), out_dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, steps * TILE), lambda i, j: (i, 0)),
            pl.BlockSpec((rows, steps), lambda i, j: (i, 0)),
            pl.BlockSpec((columns, steps * TILE), lambda i, j: (j, 0)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="fp8_matmul_tpu",
    )(left, by_row, right, by_block)
    return out[:m, :n]


def _kernel(left, by_row, right, by_block, out, *, steps, multiply_fp8):
    rows, columns = out.shape
    operand = left.dtype if multiply_fp8 else jnp.bfloat16
    first_block = pl.program_id(1) * (columns // TILE)
    step_of = lax.broadcasted_iota(jnp.int32, (rows, steps), 1)
    block_of = lax.broadcasted_iota(jnp.int32, (1, columns), 1) // TILE

    def one(i, sums):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        product = lax.dot_general(
            left[:, at].astype(operand),
            right[:, at].astype(operand),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # A column of scales, taken out of its row by a mask: lanes cannot be indexed.
        row_scale = jnp.sum(jnp.where(step_of == i, by_row[...], 0.0), axis=1, keepdims=True)
        column_scale = jnp.zeros((1, columns), jnp.float32)
        for block in range(columns // TILE):
            column_scale = jnp.where(block_of == block, by_block[first_block + block, i], column_scale)
        return sums + product * (row_scale * column_scale)

    sums = lax.fori_loop(0, steps, one, jnp.zeros((rows, columns), jnp.float32))
    out[...] = sums.astype(out.dtype)

"""FP8 quantisation for Hopper, in Pallas Mosaic GPU: each element read once and written once.

A block of 128 threads takes a tile, from copy engine to copy engine; enough blocks lie on a
multiprocessor at a time for the copies to overlap. Rows: a tile's largest magnitude is found across the
four threads that hold a row. Columns: see `transpose.py`; weights: `blocks.py`; twelve bits:
`mosaic_gpu_e5m6.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_quantize import blocks as block_kernel
from pallas_kernels.fp8_quantize import mosaic_gpu_e5m6 as e5m6_kernel
from pallas_kernels.fp8_quantize import reference
from pallas_kernels.fp8_quantize import transpose as column_kernel
from pallas_kernels.fp8_quantize.reference import SMALLEST_SCALE, TILE
from pallas_kernels.grouped_matmul import mosaic_gpu as bf16
from pallas_kernels.grouped_matmul import varying
from pallas_kernels.grouped_matmul.hopper import WARPGROUP_ROWS, swizzled

# Four neighbouring elements a thread, so that FP8 is stored in words of 32 bits.
LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X
PER_ROW = LAYOUT.reduce(1)


def _unsupported(x, multiples) -> str | None:
    reason = bf16.unsupported(jax.ShapeDtypeStruct((1, 1), jnp.bfloat16), jnp.bfloat16(0), False)
    if reason is None and any(size % multiple for size, multiple in zip(x.shape, multiples, strict=True)):
        return f"shape {x.shape} is no multiple of {multiples}: take 'reference'"
    return reason


_WHOLE = "one scale for the whole tensor: take 'reference'"


def unsupported_rows(x, swiglu: bool, per_tensor: bool = False) -> str | None:
    """Why `rows` cannot run the call, or None."""
    if per_tensor:
        return _WHOLE
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"an operand in {x.dtype}: cast it to bfloat16 or float32"
    return _unsupported(x, (8, TILE * (2 if swiglu else 1)))


def unsupported_columns(x, per_tensor: bool = False) -> str | None:
    """Why `columns` cannot run the call, or None."""
    if per_tensor:
        return _WHOLE
    if x.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"an operand in {x.dtype}: cast it to bfloat16 or quantise it to float8_e4m3fn"
    return _unsupported(x, (8, TILE))


# Jitted: calls of the same shape within one program are traced, lowered and compiled once.
@functools.partial(jax.jit, static_argnames=("power_of_two", "dtype", "swiglu"))
def rows(x, *, power_of_two, dtype, swiglu=False):
    """Values `[rows, k]` and scales `[k/128, rows]`."""
    count, k = x.shape[0], x.shape[1] // (2 if swiglu else 1)
    operands = 2 if swiglu else 1
    tiles = 2 if operands == 1 and k // TILE % 2 == 0 else 1  # Of 64 rows, for one block of threads.
    # The copy engine cuts a tile's values at the last row, but not its scales: they get room.
    room = count + -count % WARPGROUP_ROWS
    kernel = plgpu.kernel(
        functools.partial(_rows_kernel, power_of_two=power_of_two, tiles=tiles, operands=operands),
        out_type=(
            jax.ShapeDtypeStruct((count, k), dtype),
            jax.ShapeDtypeStruct((k // TILE, room), jnp.float32),
        ),
        grid=(pl.cdiv(count, WARPGROUP_ROWS), k // TILE // tiles),
        grid_names=("row", "column"),
        scratch_types=dict(
            x_smem=plgpu.SMEM((tiles, operands, WARPGROUP_ROWS, TILE), x.dtype, transforms=swizzled(x.dtype)),
            values_smem=plgpu.SMEM((tiles, WARPGROUP_ROWS, TILE), dtype, transforms=swizzled(dtype)),
            scales_smem=plgpu.SMEM((tiles, WARPGROUP_ROWS), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=operands, num_barriers=tiles),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_quantize_rows",
    )
    values, scales = kernel(x)
    return varying.like(x, (values, scales if room == count else scales[:, :count]))


def _rows_kernel(
    x, values, scales, *, x_smem, values_smem, scales_smem, loaded, power_of_two, tiles, operands
):
    down = pl.ds(lax.axis_index("row") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    first = lax.axis_index("column") * tiles
    for i in range(tiles):
        for j in range(operands):
            across = pl.ds((first + i) * TILE + j * values.shape[1], TILE)
            plgpu.copy_gmem_to_smem(x.at[down, across], x_smem.at[i, j], loaded.at[i])
    for i in range(tiles):
        plgpu.barrier_wait(loaded.at[i])
        tile, *up = (plgpu.load(x_smem.at[i, j], layout=LAYOUT).astype(jnp.float32) for j in range(operands))
        if up:
            tile = tile * up[0] / (1 + jnp.exp(-tile))
        amax = jnp.max(jnp.abs(tile), axis=1)
        scale, inverse = _scale_and_inverse(amax, float(jnp.finfo(values.dtype).max), power_of_two)
        tile = tile * plgpu.layout_cast(lax.broadcast_in_dim(inverse, tile.shape, (0,)), LAYOUT)
        values_smem[i] = tile.astype(values.dtype)
        scales_smem[i] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem.at[i], values.at[down, pl.ds((first + i) * TILE, TILE)])
        plgpu.copy_smem_to_gmem(scales_smem.at[i], scales.at[first + i, down])
    plgpu.wait_smem_to_gmem(0)


def _scale_and_inverse(amax, largest: float, power_of_two: bool):
    """`reference.scale_and_inverse` on registers."""
    scale = jnp.maximum(amax * (1 / largest), SMALLEST_SCALE)
    if not power_of_two:
        return scale, jnp.minimum(largest / jnp.maximum(amax, SMALLEST_SCALE), 1 / SMALLEST_SCALE)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    bits = (bits + 0x007FFFFF) & 0x7F800000
    up = lax.bitcast_convert_type(bits, jnp.float32)
    inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    finite, nan = amax < jnp.inf, jnp.full(amax.shape, jnp.nan, jnp.float32)
    return jnp.where(finite, up, nan), jnp.where(finite, inverse, nan)


def unsupported_blocks(w, per_tensor: bool = False) -> str | None:
    """Why `blocks` cannot run the call, or None."""
    if per_tensor:
        return _WHOLE
    if w.dtype != jnp.float32:
        return f"weights in {w.dtype}: keep them in float32"
    return _unsupported(w, (*[1] * (w.ndim - 2), TILE, TILE))


def blocks(w, *, power_of_two, dtype, transpose=False):
    """Values like `w` and scales `[..., rows/128, k/128]`; of the transposed `w` if `transpose`."""
    stack = w.shape[:-2]
    out = block_kernel.blocks(
        w.reshape(-1, *w.shape[-2:]), power_of_two=power_of_two, dtype=dtype, transpose=transpose
    )
    return varying.like(w, tuple(x.reshape(*stack, *x.shape[1:]) for x in out))


def columns(x, group_sizes, *, power_of_two, dtype):
    """Values `[k, padded]` and scales `[padded/128, k]`."""
    values, scales = x if isinstance(x, tuple) else (x, None)
    table = reference.row_blocks(group_sizes, values.shape[0])
    values, table = varying.together(values, table)
    out = column_kernel.columns(values, scales, table, power_of_two=power_of_two, dtype=dtype)
    return varying.like(values, out)


def unsupported_pack_e5m6(x) -> str | None:
    """Why `pack_e5m6` cannot run the call, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"an operand in {x.dtype}: cast it to bfloat16 or float32"
    return _unsupported(_as_matrix(x), (8, TILE))


def unsupported_unpack_e5m6(values, scales, dtype) -> str | None:
    """Why `unpack_e5m6` cannot run the call, or None."""
    if values.dtype != jnp.uint8 or dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{values.dtype} to {dtype}: take uint8 to bfloat16, float16 or float32"
    if scales is not None:
        wanted = (values.shape[1] // e5m6_kernel.BYTES, values.shape[0])
        if scales.shape != wanted or scales.dtype != jnp.float32:
            return f"scales {scales.dtype}{scales.shape}, not float32{wanted}: take 'reference'"
    return _unsupported(_as_matrix(values), (8, e5m6_kernel.BYTES))


def _as_matrix(x):
    return jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)


def pack_e5m6(x, *, scaled):
    """Like `x` but uint8 `[..., k * 3 / 2]`; of `[rows, k]`, if scaled, and the scales `[k/128, rows]`."""
    values, scales = e5m6_kernel.pack(x.reshape(-1, x.shape[-1]), scaled=scaled)
    return varying.like(x, (values.reshape(*x.shape[:-1], -1), scales))


def unpack_e5m6(values, scales, *, dtype):
    """The numbers of `pack_e5m6`, times their scales if there are any."""
    if scales is not None:
        values, scales = varying.together(values, scales)
    out = e5m6_kernel.unpack(values.reshape(-1, values.shape[-1]), scales, dtype=jnp.dtype(dtype))
    return varying.like(values, out.reshape(*values.shape[:-1], -1))

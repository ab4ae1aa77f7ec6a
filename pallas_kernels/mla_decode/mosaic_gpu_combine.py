"""Decoding attention for Hopper in Pallas Mosaic GPU: the kernel that merges the groups' partial results."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common

THREADS = 128
_MANY = 256  # programs of a whole row are better than four times as many


def combine(parts, lses, bounds, *, call):
    """Softmax-weighted sum of a sequence's parts.

    Args:
      parts: float32 `[parts, part_rows, rank]`.
      lses: float32 `[parts, tiles * 64]`, in base 2.
      bounds: int32 `[batch, 2]`: the first part of a sequence, and the end of its parts.
      call: what is static.

    Returns:
      The output `[batch, rows, rank]` in bf16 and its log-sum-exp `[batch, rows]` in float32; 0 and -inf
      where a sequence has no part.
    """
    # Few sequences have many parts each, of which many are read at a time; many need no finer division.
    parts_each = call.splits or 1 + call.groups / call.batch
    together = next((n for n in (4, 8, 16) if parts_each <= n), 32)
    each = next(n for n in (4, 2, 1) if call.rank % (n * THREADS) == 0)  # Columns of a thread.
    each = each if call.batch * call.rows >= _MANY else 1
    width, layout = each * THREADS, plgpu.Layout.WG_STRIDED((each * THREADS,), each)

    def kernel(parts, lses, bounds, out, lse_out):
        b, row, chunk = (lax.axis_index(name) for name in ("b", "row", "chunk"))
        columns = pl.ds(chunk * width, width)
        first, last = bounds[b, 0], bounds[b, 1]

        def body(i, carry):
            peak, total, value = carry
            numbers = [first + i * together + j for j in range(together)]
            found = []
            for number in numbers:
                part = jnp.minimum(number, last - 1)
                x = plgpu.load(parts.at[part, row, columns], layout=layout)
                found.append((jnp.where(number < last, lses[part, row], -jnp.inf), x))
            new_peak = peak
            for lse, _ in found:
                new_peak = jnp.maximum(new_peak, lse)
            below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            factor = jnp.exp2(peak - below)
            total, value = total * factor, value * factor
            for lse, x in found:
                weight = jnp.exp2(lse - below)
                total, value = total + weight, value + x * weight
            return new_peak, total, value

        zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        start = (jnp.float32(-jnp.inf), jnp.float32(0), zeros)
        steps = lax.div(last - first + together - 1, together)
        peak, total, value = lax.fori_loop(0, steps, body, start)
        safe = jnp.where(total > 0, total, 1.0)
        out[b, row, columns] = (value * (1 / safe)).astype(jnp.bfloat16)

        @pl.when(chunk == 0)
        def _():
            lse_out[b, row] = jnp.where(total > 0, (peak + jnp.log2(safe)) / common.LOG2E, -jnp.inf)

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((call.batch, call.rows, call.rank), jnp.bfloat16),
            jax.ShapeDtypeStruct((call.batch, call.rows), jnp.float32),
        ],
        grid=(call.rank // width, call.rows, call.batch),
        grid_names=("chunk", "row", "b"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="mla_decode_combine",
    )(parts, lses, bounds)

"""Product of two FP8 matrices whose scales cover 128 of the contraction (DeepSeek-V3, arXiv 2412.19437, 3.3).

All three products of a linear layer are this one, `lhs @ rhs.T`:

- forward: rows of activations (`quantize_rows`) by the transposed weights (`quantize_blocks(w.T)`);
- dgrad: rows of output gradients by the weights as they lie (`quantize_blocks(w)`);
- wgrad: both operands transposed, with 128x1 tiles (`quantize_columns`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import implementations
from pallas_kernels.fp8_grouped_matmul import unpromoted
from pallas_kernels.fp8_matmul import bf16, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.fp8_quantize import TILE, Quantized
from pallas_kernels.grouped_matmul import varying

_MODULES = {"reference": reference, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "bf16": bf16}
IMPLEMENTATIONS = tuple(_MODULES)
_PREFERENCE = {
    "cpu": ("reference",),
    "gpu": ("mosaic_gpu", "reference"),
    "tpu": ("mosaic_tpu", "bf16"),
}


def fp8_matmul(
    lhs: Quantized,
    rhs: Quantized,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulate: Float[Array, "m n"] | None = None,
    promote: bool = True,
    implementation: str = "auto",
) -> Float[Array, "m n"]:
    """`lhs @ rhs.T` of the dequantised operands: exact products of FP8, summed in float32.

    Every 128 of the contraction is summed by itself, scaled, and added in float32, because Hopper's
    tensor cores keep about 14 bits. Not differentiable: a linear layer has three such products, each of
    operands quantised for it.

    Args:
      lhs: values `[m, k]` with row scales `[ceil(k/128), m]`.
      rhs: values `[n, k]` with block scales `[ceil(n/128), ceil(k/128)]` or row scales `[ceil(k/128), n]`.
      out_dtype: bfloat16 or float32.
      accumulate: added to the product in float32, before it is rounded to `out_dtype`. On Hopper, in float32
        and with m and n multiples of 64, the product is added to its memory, if that is not needed again:
        donate it, or carry it through a loop.
      promote: False leaves the whole sum to the tensor cores, to see what that costs; the scales must then be
        the same all along k. The reference sums in float32 either way.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper), `"mosaic_tpu"` (TPU7x multiplies FP8, older chips
        bfloat16), `"bf16"` (dequantises to bfloat16) or `"reference"` (to float32).

    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    (m, k), (n, k2) = lhs.values.shape, rhs.values.shape
    steps = -(-k // TILE)
    if k != k2:
        raise ValueError(
            f"fp8_matmul: lhs [m, k] {lhs.values.shape} and rhs [n, k] {rhs.values.shape}: k differs"
        )
    if lhs.scales.shape != (steps, m):
        raise ValueError(f"fp8_matmul: lhs scales {lhs.scales.shape}, expected {(steps, m)}: [k/128, m]")
    by_row, by_block = (steps, n), (-(-n // TILE), steps)
    if rhs.scales.shape not in (by_row, by_block):
        raise ValueError(
            f"fp8_matmul: rhs scales {rhs.scales.shape}, expected {by_block} (128x128 blocks)"
            f" or {by_row} (rows)"
        )
    if accumulate is not None and accumulate.shape != (m, n):
        raise ValueError(f"fp8_matmul: accumulate {accumulate.shape}, expected {(m, n)}")
    constraints = {name: functools.partial(module.unsupported, lhs, rhs) for name, module in _MODULES.items()}
    chosen = implementations.choose("fp8_matmul", implementation, constraints, _PREFERENCE)
    out_dtype = jnp.dtype(out_dtype)
    operands = varying.together(*lhs, *rhs)
    lhs, rhs = Quantized(*operands[:2]), Quantized(*operands[2:])
    if accumulate is not None:
        accumulate, _ = varying.together(accumulate, lhs.values)
        if chosen == "mosaic_gpu" and promote and mosaic_gpu.adds_into(accumulate, out_dtype):
            added = mosaic_gpu.matmul(lhs, rhs, out_dtype=out_dtype, accumulate=accumulate)
            return varying.like(accumulate, added)
    computed = out_dtype if accumulate is None else jnp.dtype(jnp.float32)
    matmul = _MODULES[chosen].matmul
    if not promote and chosen == "mosaic_gpu":
        matmul = unpromoted.dense
    product = varying.like(lhs.values, matmul(lhs, rhs, out_dtype=computed))
    return product if accumulate is None else (product + accumulate).astype(out_dtype)

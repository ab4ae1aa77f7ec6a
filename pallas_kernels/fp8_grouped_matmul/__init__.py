"""FP8 products of consecutive groups of rows, each with its own matrix: the experts' three products.

Forward and dgrad multiply rows by their group's matrix; wgrad contracts the rows of each group. Scales
and arithmetic are those of `fp8_matmul`, groups those of `grouped_matmul`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import implementations
from pallas_kernels.fp8_grouped_matmul import bf16, mosaic_gpu, mosaic_tpu, reference, unpromoted
from pallas_kernels.fp8_quantize import TILE, Quantized
from pallas_kernels.grouped_matmul import varying

_MODULES = {"reference": reference, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "bf16": bf16}
IMPLEMENTATIONS = tuple(_MODULES)
_PREFERENCE = {
    "cpu": ("reference",),
    "gpu": ("mosaic_gpu", "reference"),
    "tpu": ("mosaic_tpu", "bf16"),
}


def _choose(op: str, requested: str, lhs, rhs, promote: bool):
    constraints = {name: functools.partial(module.unsupported, lhs, rhs) for name, module in _MODULES.items()}
    chosen = implementations.choose(op, requested, constraints, _PREFERENCE)
    return unpromoted if chosen == "mosaic_gpu" and not promote else _MODULES[chosen]


def _together(lhs, rhs, group_sizes):
    *operands, group_sizes = varying.together(*lhs, *rhs, group_sizes)
    return Quantized(*operands[:2]), Quantized(*operands[2:]), group_sizes


def fp8_grouped_matmul(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, " groups"],
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    promote: bool = True,
    implementation: str = "auto",
) -> Float[Array, "rows n"]:
    """Multiplies rows `[sum(sizes[:g]), sum(sizes[:g+1]))` of `lhs` by `rhs[g].T`, for every group g.

    Args:
      lhs: values `[rows, k]`, sorted by group, with row scales `[ceil(k/128), rows]`.
      rhs: values `[groups, n, k]` with block scales `[groups, ceil(n/128), ceil(k/128)]`. Forward takes
        the transposed weights, dgrad the weights.
      group_sizes: int32, any sizes, zeros allowed; their sum must not exceed the rows. Rows past it come
        out as zero.
      out_dtype: bfloat16 or float32.
      promote: as for `fp8_matmul`.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper), `"mosaic_tpu"` (TPU7x multiplies FP8, older chips
        bfloat16), `"bf16"` (dequantises to bfloat16 first) or `"reference"` (to float32).

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    if lhs.values.ndim != 2 or rhs.values.ndim != 3 or lhs.values.shape[1] != rhs.values.shape[2]:
        raise ValueError(
            f"fp8_grouped_matmul: lhs {lhs.values.shape} and rhs {rhs.values.shape} do not contract;"
            " expected [rows, k] and [groups, n, k]"
        )
    (rows, k), (groups, n, _) = lhs.values.shape, rhs.values.shape
    expected = (-(-k // TILE), rows), (groups, -(-n // TILE), -(-k // TILE))
    if (lhs.scales.shape, rhs.scales.shape) != expected:
        raise ValueError(
            f"fp8_grouped_matmul: scales {lhs.scales.shape} and {rhs.scales.shape},"
            f" expected {expected[0]} and {expected[1]}"
        )
    if group_sizes.shape != (groups,):
        raise ValueError(f"fp8_grouped_matmul: group_sizes {group_sizes.shape}, expected ({groups},)")
    module = _choose("fp8_grouped_matmul", implementation, lhs, rhs, promote)
    lhs, rhs, group_sizes = _together(lhs, rhs, group_sizes)
    return varying.like(lhs.values, module.forward(lhs, rhs, group_sizes, out_dtype=jnp.dtype(out_dtype)))


def fp8_grouped_wgrad(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, " groups"],
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    accumulate: Float[Array, "groups m n"] | None = None,
    promote: bool = True,
    implementation: str = "auto",
) -> Float[Array, "groups m n"]:
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`; zero for an empty group.

    Args:
      lhs, rhs: values `[m, padded]` and `[n, padded]` with row scales, as
        `quantize_columns(x, group_sizes)` lays them out: each group starts at a multiple of 128.
      group_sizes: rows of each group before they were padded.
      out_dtype: float32 or bfloat16.
      accumulate: added to the product, as for `fp8_matmul`.
      promote, implementation: as for `fp8_grouped_matmul`; without `promote` an operand has one scale.

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    if lhs.values.shape[1] != rhs.values.shape[1] or lhs.values.shape[1] % TILE:
        raise ValueError(
            f"fp8_grouped_wgrad: lhs {lhs.values.shape} and rhs {rhs.values.shape}, expected [m, padded] and"
            " [n, padded], padded a multiple of 128: quantize_columns(x, group_sizes)"
        )
    steps = lhs.values.shape[1] // TILE
    for name, operand in (("lhs", lhs), ("rhs", rhs)):
        if operand.scales.shape != (steps, operand.values.shape[0]):
            raise ValueError(
                f"fp8_grouped_wgrad: {name} scales {operand.scales.shape}, expected"
                f" {(steps, operand.values.shape[0])}: one for each feature and 128 rows"
            )
    module = _choose("fp8_grouped_wgrad", implementation, lhs, rhs, promote)
    lhs, rhs, group_sizes = _together(lhs, rhs, group_sizes)
    out_dtype = jnp.dtype(out_dtype)
    if accumulate is None:
        return varying.like(lhs.values, module.wgrad(lhs, rhs, group_sizes, out_dtype=out_dtype))
    expected = len(group_sizes), lhs.values.shape[0], rhs.values.shape[0]
    if accumulate.shape != expected:
        raise ValueError(f"fp8_grouped_wgrad: accumulate {accumulate.shape}, expected {expected}")
    accumulate, _ = varying.together(accumulate, lhs.values)
    if module is mosaic_gpu and mosaic_gpu.adds_into(accumulate, out_dtype):
        added = mosaic_gpu.wgrad(lhs, rhs, group_sizes, out_dtype=out_dtype, accumulate=accumulate)
        return varying.like(accumulate, added)
    product = module.wgrad(lhs, rhs, group_sizes, out_dtype=jnp.dtype(jnp.float32))
    return (varying.like(lhs.values, product) + accumulate).astype(out_dtype)

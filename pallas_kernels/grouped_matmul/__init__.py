"""Grouped matrix product: consecutive groups of rows, each multiplied by its own matrix.

This is the expert product of a dropless mixture of experts (MegaBlocks, arXiv 2211.15841): tokens
sorted by expert are the rows, experts are the groups, and the sizes are known only at run time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import implementations
from pallas_kernels.grouped_matmul import blocked, mosaic_gpu, mosaic_tpu, reference, varying

# Each module offers `forward(lhs, rhs, group_sizes, *, transpose_rhs, out_dtype)`,
# `wgrad(lhs, dout, group_sizes, *, out_dtype)` and `unsupported(lhs, rhs, transpose_rhs) -> str | None`.
_MODULES = {"reference": reference, "blocked": blocked, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
IMPLEMENTATIONS = tuple(_MODULES)
_PREFERENCE = {"cpu": ("blocked",), "gpu": ("mosaic_gpu", "reference"), "tpu": ("mosaic_tpu", "reference")}


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"] | Float[Array, "groups n k"],
    group_sizes: Int[Array, " groups"],
    *,
    transpose_rhs: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "rows n"]:
    """Multiplies rows `[sum(sizes[:g]), sum(sizes[:g+1]))` of `lhs` by `rhs[g]`, for every group g.

    Products accumulate in float32. Differentiable in `lhs` and `rhs`; the gradient of `rhs` has its
    dtype and that of an empty group is zero.

    Args:
      lhs: rows sorted by group.
      rhs: one matrix a group; `[groups, n, k]` with `transpose_rhs`.
      group_sizes: rows in each group, int32, any sizes, zeros allowed; their sum must not exceed
        the number of rows. Rows past the sum come out as zero.
      transpose_rhs: multiply by `rhs[g].T`.
      out_dtype: dtype of the result; that of `lhs` by default.
      implementation: `"auto"`, or one by name: `"mosaic_gpu"` (Hopper, bf16 or f16), `"mosaic_tpu"`
        (bf16 or f32), `"blocked"` (plain JAX, cost in proportion to the rows) or `"reference"`
        (`jax.lax.ragged_dot`, which on CPU and GPU computes every row with every group).

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    k_axis = 2 if transpose_rhs else 1
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[k_axis]:
        raise ValueError(
            f"grouped_matmul: lhs {lhs.shape} and rhs {rhs.shape} (transpose_rhs={transpose_rhs}) do not "
            f"contract; expected [rows, k] and {'[groups, n, k]' if transpose_rhs else '[groups, k, n]'}"
        )
    if group_sizes.shape != (rhs.shape[0],):
        raise ValueError(f"grouped_matmul: group_sizes {group_sizes.shape}, expected ({rhs.shape[0]},)")
    constraints = {
        name: functools.partial(module.unsupported, lhs, rhs, transpose_rhs)
        for name, module in _MODULES.items()
    }
    chosen = implementations.choose("grouped_matmul", implementation, constraints, _PREFERENCE)
    dtype = jnp.dtype(out_dtype or lhs.dtype)
    lhs, rhs, group_sizes = varying.together(lhs, rhs, group_sizes)
    return _product(lhs, rhs, group_sizes, transpose_rhs, dtype, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(lhs, rhs, group_sizes, transpose_rhs, out_dtype, chosen):
    out = _MODULES[chosen].forward(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs, out_dtype=out_dtype)
    return varying.like(lhs, out)


def _product_fwd(lhs, rhs, group_sizes, transpose_rhs, out_dtype, chosen):
    out = _product(lhs, rhs, group_sizes, transpose_rhs, out_dtype, chosen)
    return out, (lhs, rhs, group_sizes)


def _product_bwd(transpose_rhs, out_dtype, chosen, saved, dout):
    lhs, rhs, group_sizes = saved
    module = _MODULES[chosen]
    dout = dout.astype(lhs.dtype)  # The tensor cores take one dtype; the paper's gradients are bf16 too.
    dlhs = module.forward(dout, rhs, group_sizes, transpose_rhs=not transpose_rhs, out_dtype=lhs.dtype)
    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    drhs = module.wgrad(left, right, group_sizes, out_dtype=rhs.dtype)
    return *varying.like(lhs, (dlhs, drhs)), None


_product.defvjp(_product_fwd, _product_bwd)

"""DeepSeek-V3's FP8 recipe (arXiv 2412.19437, section 3.3): operands, products, and the linear layer.

    Fprop   y  = x  @ w      x by 1x128 tiles,  w by 128x128 blocks
    Dgrad   dx = dy @ w.T    dy by 1x128 tiles, w by the same blocks
    Wgrad   dw = x.T @ dy    both by 128x1 tiles, x regrouped from the FP8 copy that Fprop made

Scales come from the tile at hand, products are summed in float32. Activations and their gradients are
bfloat16 between the products; weights and their gradients are float32. The backward pass keeps of x
its FP8 copy only (E5M6 of the attention output, if asked for), and quantises w again.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import FP8Config
from pallas_kernels import (
    PackedE5M6,
    Quantized,
    fp8_grouped_matmul,
    fp8_grouped_wgrad,
    fp8_matmul,
    pack_rows_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    unpack_rows_e5m6,
)

_DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
Sizes = Int[Array, " groups"] | None  # Rows of each group; None: one matrix for all rows.


def activation(
    x: Float[Array, "rows k"], recipe: FP8Config, *, power_of_two: bool = False, swiglu: bool = False
) -> Quantized:
    """An activation by 1x128 tiles; with `swiglu`, SwiGLU of `[gate, up]`."""
    return quantize_rows(
        x,
        power_of_two=power_of_two,
        per_tensor=recipe.activation_scales == "tensor",
        swiglu=swiglu,
        implementation=recipe.implementation,
    )


def gradient(g: Float[Array, "rows n"], recipe: FP8Config, *, power_of_two: bool = False) -> Quantized:
    """An output gradient by 1x128 tiles."""
    return quantize_rows(
        g,
        power_of_two=power_of_two,
        dtype=_DTYPES[recipe.gradient_dtype],
        per_tensor=recipe.activation_scales == "tensor",
        implementation=recipe.implementation,
    )


def weight(w: Float[Array, "*groups k n"], recipe: FP8Config, *, transpose: bool = False) -> Quantized:
    """A weight, or one for each group, by 128x128 blocks.

    FP8 tensor cores want the contraction innermost: Fprop takes it transposed, Dgrad as it lies.
    """
    return quantize_blocks(
        w,
        transpose=transpose,
        per_tensor=recipe.weight_scales == "tensor",
        implementation=recipe.implementation,
    )


def product(lhs: Quantized, rhs: Quantized, sizes: Sizes, recipe: FP8Config, dtype) -> Float[Array, "rows n"]:
    """`lhs @ rhs.T`, group by group if there are groups: Fprop of transposed weights, Dgrad of weights."""
    options = {"out_dtype": dtype, "promote": recipe.promotion, "implementation": recipe.implementation}
    if sizes is None:
        return fp8_matmul(lhs, rhs, **options)
    return fp8_grouped_matmul(lhs, rhs, sizes, **options)


def weight_gradient(
    x: Quantized | PackedE5M6 | Float[Array, "rows k"],
    g: Quantized | Float[Array, "rows n"],
    sizes: Sizes,
    recipe: FP8Config,
    *,
    power_of_two: bool = False,
) -> Float[Array, "*groups k n"]:
    """Wgrad, float32. What is quantised by rows already is quantised again, by columns.

    With `power_of_two` the scales of what is quantised again are again powers of two: FP8 numbers are then
    not rounded a second time, but for what falls below the new tile's range.
    """
    by_row = [power_of_two and isinstance(operand, tuple) for operand in (x, g)]
    options = {
        "per_tensor": recipe.activation_scales == "tensor",
        "implementation": recipe.implementation,
    }
    x = unpack_rows_e5m6(x, implementation=recipe.implementation) if isinstance(x, PackedE5M6) else x
    left = quantize_columns(x, sizes, power_of_two=by_row[0], **options)
    options["dtype"] = _DTYPES[recipe.gradient_dtype]
    right = quantize_columns(g, sizes, power_of_two=by_row[1], **options)
    options = {"out_dtype": jnp.float32, "promote": recipe.promotion, "implementation": recipe.implementation}
    if sizes is None:
        return fp8_matmul(left, right, **options)
    return fp8_grouped_wgrad(left, right, sizes, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    x: Float[Array, "rows k"], w: Float[Array, "k n"], recipe: FP8Config, after_attention: bool = False
) -> Float[Array, "rows n"]:
    """`x @ w` with all three products in FP8, in the dtype of x.

    Args:
      x: activations.
      w: float32 master weights.
      recipe: the recipe.
      after_attention: x is the output of attention: its scales are powers of two if the recipe says so, and
        Wgrad takes it as `recipe.attention_output` says.
    """
    return _linear_fwd(x, w, recipe, after_attention)[0]


def _linear_fwd(x: Array, w: Array, recipe: FP8Config, after_attention: bool):
    x8 = activation(x, recipe, power_of_two=after_attention and recipe.power_of_two)
    keep = recipe.attention_output if after_attention else "fp8"
    kept = x8 if keep == "fp8" else x
    if keep == "e5m6":
        kept = pack_rows_e5m6(x, implementation=recipe.implementation)
    return product(x8, weight(w, recipe, transpose=True), None, recipe, x.dtype), (kept, w)


def _linear_bwd(recipe, after_attention, saved, dy):
    kept, w = saved
    dx = product(gradient(dy, recipe), weight(w, recipe), None, recipe, dy.dtype)
    regrouped = after_attention and recipe.power_of_two
    return dx, weight_gradient(kept, dy, None, recipe, power_of_two=regrouped)


linear.defvjp(_linear_fwd, _linear_bwd)

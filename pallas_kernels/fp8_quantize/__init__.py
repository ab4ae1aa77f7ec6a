"""Quantisation to FP8, a scale for every 1x128 tile or 128x128 block (DeepSeek-V3, arXiv 2412.19437, 3.3).

A tile is divided by its scale, which maps its largest magnitude to the largest finite number of the
dtype (448 for E4M3), and rounded to nearest even. Scales are float32: exact (`amax / 448`), or rounded
up to a power of two, which loses nothing when the tile is later regrouped.

At the edges: a tile of zeros comes back as zeros; its scale, like any, is at least 2^-100, so that what
is smaller than 2^-110 counts as zero. A tile that holds an infinity or a NaN dequantises to NaN
throughout, so that a diverging run shows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import implementations
from pallas_kernels.fp8_quantize import mosaic_gpu, reference
from pallas_kernels.fp8_quantize.reference import TILE, padded_rows

__all__ = [
    "TILE",
    "PackedE5M6",
    "Quantized",
    "dequantize",
    "pack_e5m6",
    "pack_rows_e5m6",
    "padded_rows",
    "quantize_blocks",
    "quantize_columns",
    "quantize_rows",
    "unpack_e5m6",
    "unpack_rows_e5m6",
]

_MODULES = {"reference": reference, "mosaic_gpu": mosaic_gpu}
IMPLEMENTATIONS = tuple(_MODULES)
_PREFERENCE = {"cpu": ("reference",), "gpu": ("mosaic_gpu", "reference"), "tpu": ("reference",)}
DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


class Quantized(NamedTuple):
    """FP8 numbers and the float32 scales that they are multiplied by.

    Attributes:
      values: `[rows, k]`, or a stack `[..., rows, k]`.
      scales: `[ceil(k/128), rows]` when every row has a scale for each 128 columns (rows innermost, as
        the matrix kernels fetch them), or `[..., ceil(rows/128), ceil(k/128)]`, one a 128x128 block.
    """

    values: Array
    scales: Array


class PackedE5M6(NamedTuple):
    """Twelve-bit numbers and the power-of-two scales of their 1x128 tiles.

    Attributes:
      values: uint8 `[rows, k * 3 / 2]`, see `pack_e5m6`.
      scales: float32 `[ceil(k/128), rows]`.
    """

    values: Array
    scales: Array


def _check(op: str, x, dtype):
    if jnp.dtype(dtype) not in [jnp.dtype(known) for known in DTYPES]:
        raise ValueError(f"{op}: dtype={jnp.dtype(dtype)}, expected float8_e4m3fn or float8_e5m2")
    if x.ndim != 2:
        raise ValueError(f"{op}: an operand of shape {x.shape}, expected [rows, columns]")


def _choose(op: str, requested: str, constraint):
    constraints = {"reference": lambda: None, "mosaic_gpu": constraint}
    return _MODULES[implementations.choose(op, requested, constraints, _PREFERENCE)]


def quantize_rows(
    x: Float[Array, "rows k"],
    *,
    power_of_two: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    per_tensor: bool = False,
    swiglu: bool = False,
    implementation: str = "auto",
) -> Quantized:
    """Quantises 1x128 tiles: activations and output gradients, as forward and dgrad products take them.

    Args:
      x: float32 or bfloat16.
      power_of_two: round the scales up to powers of two.
      dtype: `float8_e4m3fn` or `float8_e5m2`.
      per_tensor: give every tile the scale of the largest, for comparisons; by the reference only.
      swiglu: `x` is `[gate, up]` side by side, and `silu(gate) * up` is quantised, `[rows, k / 2]`. It is
        computed in float32 and not rounded in between.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper; rows and k multiples of 8 and 128) or `"reference"`.

    Returns:
      Values `[rows, k]` and scales `[ceil(k/128), rows]`.
    """
    _check("quantize_rows", x, dtype)
    if swiglu and x.shape[1] % 2:
        raise ValueError(
            f"quantize_rows: swiglu needs gate and up side by side; {x.shape[1]} columns are odd"
        )
    module = _choose(
        "quantize_rows", implementation, functools.partial(mosaic_gpu.unsupported_rows, x, swiglu, per_tensor)
    )
    options = {"per_tensor": True} if per_tensor else {}
    options |= {"power_of_two": power_of_two, "dtype": jnp.dtype(dtype), "swiglu": swiglu}
    return Quantized(*module.rows(x, **options))


def quantize_columns(
    x: Float[Array, "rows k"] | Quantized,
    group_sizes: Int[Array, " groups"] | None = None,
    *,
    power_of_two: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    per_tensor: bool = False,
    implementation: str = "auto",
) -> Quantized:
    """Transposes and quantises 128x1 tiles: what weight gradients take, whose contraction is the rows.

    Of a `Quantized` operand with row scales it is the fused transpose-and-requantise of the saved
    activations.

    Args:
      x: float32 or bfloat16, or quantised with row scales.
      group_sizes: rows of each group, for grouped weight gradients; every group then starts at a
        multiple of 128 rows of the result and is filled up with zeros.
      power_of_two, dtype, per_tensor, implementation: as for `quantize_rows`.

    Returns:
      Values `[k, padded]` and scales `[padded / 128, k]`, where `padded` is `padded_rows(rows, groups)`.
    """
    values = x.values if isinstance(x, Quantized) else x
    _check("quantize_columns", values, dtype)
    if isinstance(x, Quantized) and x.scales.shape != (-(-values.shape[1] // TILE), values.shape[0]):
        raise ValueError(
            f"quantize_columns: scales {x.scales.shape} of values {values.shape}, expected one for each row"
            f" and 128 columns, {(-(-values.shape[1] // TILE), values.shape[0])}"
        )
    module = _choose(
        "quantize_columns",
        implementation,
        functools.partial(mosaic_gpu.unsupported_columns, values, per_tensor),
    )
    options = {"per_tensor": True} if per_tensor else {}
    options |= {"power_of_two": power_of_two, "dtype": jnp.dtype(dtype)}
    return Quantized(*module.columns(x, group_sizes, **options))


def quantize_blocks(
    w: Float[Array, "*stack rows k"],
    *,
    transpose: bool = False,
    power_of_two: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float8_e4m3fn,
    per_tensor: bool = False,
    implementation: str = "auto",
) -> Quantized:
    """Quantises 128x128 blocks: weights. Scales `[..., ceil(rows/128), ceil(k/128)]`.

    Args:
      w: one matrix or a stack of them.
      transpose: return each matrix, and its scales, transposed: a block keeps its scale.
      power_of_two, dtype: as for `quantize_rows`.
      per_tensor: give every block of a matrix the scale of its largest; by the reference only.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper; float32, multiples of 128) or `"reference"`.
    """
    _check("quantize_blocks", jnp.empty((0, 0)) if w.ndim >= 2 else w, dtype)
    constraint = functools.partial(mosaic_gpu.unsupported_blocks, w, per_tensor)
    module = _choose("quantize_blocks", implementation, constraint)
    options = {"per_tensor": True} if per_tensor else {}
    options |= {"power_of_two": power_of_two, "dtype": jnp.dtype(dtype), "transpose": transpose}
    return Quantized(*module.blocks(w, **options))


def dequantize(x: Quantized, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack rows k"]:
    """Values times scales, whichever of the two ways they are scaled."""
    return reference.dequantize(x.values, x.scales).astype(dtype)


def pack_e5m6(x: Float[Array, "*stack k"], *, implementation: str = "auto") -> UInt8[Array, "*stack k*3/2"]:
    """Rounds to 12 bits (5 of exponent, 6 of mantissa) and packs two numbers in three bytes.

    How DeepSeek-V3 saves the attention output for the backward pass. Numbers up to 65,024 in magnitude;
    beyond they become infinite. `k` must be even.

    Args:
      x: the numbers; rounded to nearest even straight from float32.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper; bfloat16 or float32, rows and k multiples of 8 and
        128) or `"reference"`. All give the same bits.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"pack_e5m6: {x.shape[-1]} columns, expected an even number")
    constraint = functools.partial(mosaic_gpu.unsupported_pack_e5m6, x)
    return _choose("pack_e5m6", implementation, constraint).pack_e5m6(x, scaled=False)[0]


def unpack_e5m6(
    packed: UInt8[Array, "*stack bytes"],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    *,
    implementation: str = "auto",
) -> Float[Array, "*stack k"]:
    """The numbers that `pack_e5m6` packed, exact in float16, bfloat16 and float32.

    Args:
      packed: three bytes for every two numbers.
      dtype: of the result.
      implementation: `"auto"`, `"mosaic_gpu"` (Hopper; to the three dtypes, rows and bytes of a row multiples
        of 8 and 192) or `"reference"`. All give the same numbers.
    """
    constraint = functools.partial(mosaic_gpu.unsupported_unpack_e5m6, packed, None, jnp.dtype(dtype))
    module = _choose("unpack_e5m6", implementation, constraint)
    return module.unpack_e5m6(packed, None, dtype=dtype)


def pack_rows_e5m6(x: Float[Array, "rows k"], *, implementation: str = "auto") -> PackedE5M6:
    """Twelve bits a number with a power-of-two scale for every 1x128 tile: what DeepSeek-V3 keeps of the
    attention output for the backward pass (arXiv 2412.19437, section 3.3.3). `k` must be even.

    The largest number of a tile lies within a factor of two of 65,024, the largest that is finite.

    Args:
      x, implementation: as for `pack_e5m6`.
    """
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"pack_rows_e5m6: {x.shape}, expected [rows, k] with an even k")
    constraint = functools.partial(mosaic_gpu.unsupported_pack_e5m6, x)
    return PackedE5M6(*_choose("pack_rows_e5m6", implementation, constraint).pack_e5m6(x, scaled=True))


def unpack_rows_e5m6(
    packed: PackedE5M6, dtype: jax.typing.DTypeLike = jnp.bfloat16, *, implementation: str = "auto"
) -> Float[Array, "rows k"]:
    """The numbers of `pack_rows_e5m6`: with power-of-two scales exact in bfloat16 and float32.

    Args:
      packed: numbers and scales.
      dtype, implementation: as for `unpack_e5m6`.
    """
    constraint = functools.partial(mosaic_gpu.unsupported_unpack_e5m6, *packed, jnp.dtype(dtype))
    module = _choose("unpack_rows_e5m6", implementation, constraint)
    return module.unpack_e5m6(*packed, dtype=dtype)

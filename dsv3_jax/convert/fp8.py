"""E4M3 weights with one float32 scale for each block of 128x128, as DeepSeek-V3 was released.

The released code calls the scale `weight_scale_inv` and multiplies by it. Blocks at ragged edges are
smaller; their scale is that of what is there.
"""

import functools

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0  # Of E4M3.


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks along both axes of a matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


@functools.cache
def _decoded() -> Float[np.ndarray, "256"]:
    return np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantise(
    values: Shaped[np.ndarray, "rows cols"],
    scales: Float[np.ndarray, "row_blocks col_blocks"],
    dtype: np.dtype,
    first_row: int = 0,
) -> Shaped[np.ndarray, "rows cols"]:
    """values * scale, the product in float32 and then rounded to `dtype`, as DeepSeek's conversion does.

    Args:
      values: E4M3, some rows of a matrix.
      scales: float32, of the whole matrix.
      dtype: of the result.
      first_row: where in the matrix `values` begins.
    """
    rows, cols = values.shape
    wide = _decoded()[values.view(np.uint8)]
    by_row = scales[(first_row + np.arange(rows)) // BLOCK]
    for block in range(scales.shape[1]):
        wide[:, block * BLOCK : (block + 1) * BLOCK] *= by_row[:, block : block + 1]
    return wide.astype(dtype, copy=False)


def quantise(
    matrix: Shaped[np.ndarray, "rows cols"],
) -> tuple[Shaped[np.ndarray, "rows cols"], Float[np.ndarray, "row_blocks col_blocks"]]:
    """(E4M3 values, float32 scales): the largest magnitude of a block becomes 448.

    A block of zeros has the scale 1.
    """
    rows, cols = matrix.shape
    row_blocks, col_blocks = scale_shape(matrix.shape)
    wide = np.zeros((row_blocks * BLOCK, col_blocks * BLOCK), np.float32)
    wide[:rows, :cols] = matrix
    blocks = wide.reshape(row_blocks, BLOCK, col_blocks, BLOCK)
    largest = np.abs(blocks).max((1, 3))
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    # The division may round to a hair over the largest value, which E4M3 would turn into NaN.
    scaled = np.clip(blocks / scales[:, None, :, None], -LARGEST, LARGEST)
    return scaled.astype(E4M3).reshape(wide.shape)[:rows, :cols].copy(), scales

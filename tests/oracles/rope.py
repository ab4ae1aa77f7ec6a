"""Rotary positions and YaRN, as the released DeepSeek models apply them."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Rope(NamedTuple):
    """What attention needs to know about positions."""

    inv_freq: Float[np.ndarray, "half"]  # Radians a position, one for each rotated pair.
    interleaved: bool
    cos_sin_factor: float  # Multiplies cosine and sine.
    softmax_factor: float  # Multiplies the softmax scale.


def inverse_frequencies(dim: int, theta: float) -> Float[np.ndarray, "half"]:
    """theta^(-2i/dim) for pair i (RoFormer, arXiv 2104.09864, §3.2.2)."""
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)], np.float64)


def yarn_inverse_frequencies(
    dim: int, theta: float, factor: float, original_len: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Float[np.ndarray, "half"]:
    """Interpolation "by parts" (YaRN §3.2), in the form of the released code.

    A pair that turns more than `beta_fast` times over the original context keeps its frequency; one that
    turns fewer than `beta_slow` times has it divided by `factor`. In between the released code ramps linearly
    over the pair's index, between bounds rounded outwards; the paper ramps over the number of turns.
    """

    def index_with_turns(turns: float) -> float:
        # Solves original_len * theta^(-2i/dim) / (2 pi) = turns for i.
        return dim * math.log(original_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(index_with_turns(beta_fast)), 0)
    high = min(math.ceil(index_with_turns(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # As released: a step instead of a division by zero.
    result = []
    for i, frequency in enumerate(inverse_frequencies(dim, theta)):
        interpolated = min(max((i - low) / width, 0.0), 1.0)
        result.append(interpolated * frequency / factor + (1 - interpolated) * frequency)
    return np.array(result, np.float64)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, the root of the inverse temperature (YaRN §3.4); 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def make_rope(
    dim: int,
    *,
    theta: float = 10000.0,
    interleaved: bool = True,
    factor: float = 1.0,
    original_len: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
    mscale_all_dim: float = 1.0,
) -> Rope:
    """Frequencies and factors for vectors of width `dim`; `factor` 1 means plain RoPE.

    The softmax scale takes mscale(factor, mscale_all_dim)^2; cosine and sine take
    mscale(factor, mscale) / mscale(factor, mscale_all_dim) (DeepSeek-V2 and V3, released code).
    """
    if factor <= 1:
        return Rope(inverse_frequencies(dim, theta), interleaved, 1.0, 1.0)
    all_dims = yarn_mscale(factor, mscale_all_dim)
    frequencies = yarn_inverse_frequencies(dim, theta, factor, original_len, beta_fast, beta_slow)
    return Rope(frequencies, interleaved, yarn_mscale(factor, mscale) / all_dims, all_dims**2)


def rotate(x: Float[np.ndarray, "dim"], position: int, rope: Rope) -> Float[np.ndarray, "dim"]:
    """Turns pair i of `x` by position * inv_freq[i] (RoFormer eq 34), leaving each element in its place.

    Pairs are (x0, x1), (x2, x3)... if interleaved, else (x0, x_half), (x1, x_half+1)...
    """
    x = np.asarray(x, np.float64)
    half = x.shape[0] // 2
    out = np.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        cosine = math.cos(position * rope.inv_freq[i]) * rope.cos_sin_factor
        sine = math.sin(position * rope.inv_freq[i]) * rope.cos_sin_factor
        out[a] = x[a] * cosine - x[b] * sine
        out[b] = x[a] * sine + x[b] * cosine
    return out

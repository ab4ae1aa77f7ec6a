"""DeepSeek-V3's FP8 recipe (arXiv 2412.19437, section 3.3) in numpy: products of what FP8 numbers stand for.

Operands are rounded as the recipe says, in float32; products are float64.
"""

import ml_dtypes
import numpy as np

from tests.oracles.ffn import sigmoid

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def rounded(x, block, dtype="e4m3", power_of_two=False):
    """x [rows, k] through FP8 and back, with a scale for each `block` (rows, columns); None: for all of x."""
    x = np.asarray(x, np.float32)
    if not x.size:
        return x
    largest = np.float32(ml_dtypes.finfo(TYPES[dtype]).max)
    out = np.empty_like(x)
    height, width = block or x.shape
    for r in range(0, x.shape[0], height):
        for c in range(0, x.shape[1], width):
            tile = x[r : r + height, c : c + width]
            amax = np.abs(tile).max()
            scale = amax * (1 / largest)
            inverse = largest / amax
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
                inverse = 1 / scale
            numbers = (tile * inverse).astype(TYPES[dtype]).astype(np.float32)
            out[r : r + height, c : c + width] = numbers * scale
    return out


def e5m6(x):
    """x [rows, k] through E5M6 and back, 1x128 tiles scaled by powers of two to at most 65,024."""
    out = np.empty_like(x, np.float64)
    for c in range(0, x.shape[1], 128):
        tile = np.asarray(x[:, c : c + 128], np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.abs(tile).max(1, keepdims=True) / 65024))
        exponent = np.maximum(np.frexp(tile / scale)[1] - 1, -14)
        step = scale * 2.0 ** (exponent - 6)
        out[:, c : c + 128] = np.round(tile / step) * step  # Halves to even, as numpy rounds.
    return out


def along(x, per_tensor=False, **options):
    """1x128 tiles."""
    return rounded(x, None if per_tensor else (1, 128), **options)


def across(x, per_tensor=False, **options):
    """128x1 tiles."""
    return rounded(x, None if per_tensor else (128, 1), **options)


def blocks(w, per_tensor=False):
    return rounded(w, None if per_tensor else (128, 128))


def product(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def linear(
    x, w, dy, *, activations_whole=False, weights_whole=False, gradient="e4m3", power_of_two=False, kept=None
):
    """(y, dx, dw) of a linear layer; `kept` is what Wgrad takes for x, its FP8 copy by default."""
    x8 = along(x, activations_whole, power_of_two=power_of_two)
    w8, g8 = blocks(w, weights_whole), along(dy, activations_whole, dtype=gradient)
    kept = across(x8 if kept is None else kept, activations_whole, power_of_two=power_of_two)
    dw = product(kept.T, across(dy, activations_whole, dtype=gradient))
    return product(x8, w8), product(g8, w8.T), dw


def ffn(x, gate_up, down, dy, *, gates=None, power_of_two=False, keep_fp8=True):
    """(out, dx, dgates, dgate_up, ddown) of SwiGLU for rows of one expert, or of a dense layer.

    The rows of experts arrive in FP8 in both directions, and their FP8 scales may be powers of two.
    """
    x8, w8, v8 = along(x, power_of_two=power_of_two), blocks(gate_up), blocks(down)
    hidden = product(x8, w8).astype(np.float32)
    gate, up = np.split(hidden, 2, axis=1)
    scale = np.ones(len(x), np.float32) if gates is None else gates
    act = np.asarray(gate * sigmoid(gate) * up, np.float32)
    out = product(along(act) * scale[:, None], v8)

    g8 = along(dy, power_of_two=power_of_two)
    g = product(g8, v8.T)
    kept = along(hidden) if keep_fp8 else hidden
    gate, up = np.split(np.asarray(kept, np.float64), 2, axis=1)
    silu, slope = gate * sigmoid(gate), sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dgates = (g * silu * up).sum(1)
    g *= scale[:, None]
    dhidden = np.concatenate([g * up * slope, g * silu], axis=1).astype(np.float32)
    weighted = (silu * up * scale[:, None]).astype(np.float32)
    arrived = across(dy) if gates is None else across(g8, power_of_two=power_of_two)
    ddown = product(across(weighted).T, arrived)
    dx = product(along(dhidden), w8.T)
    dgate_up = product(across(x8, power_of_two=power_of_two).T, across(dhidden))
    return out, dx, dgates, dgate_up, ddown


def tensor_cores(a, b):
    """a [m, k] @ b [n, k].T of FP8 numbers as Hopper's tensor cores add them, k a multiple of 32, float64.

    One instruction adds 32 products and the sum so far: each is shifted to the largest exponent among them
    (of a product, the sum of its operands' exponents), cut to 13 bits after the point and added exactly; the
    result is cut to 13 bits of mantissa. Found bit by bit on the hardware by MMA-Sim (arXiv 2511.10909).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    total = np.zeros((len(a), len(b)))
    for k in range(0, a.shape[1], 32):
        left, right = a[:, None, k : k + 32], b[None, :, k : k + 32]
        terms = np.concatenate([left * right, total[..., None]], axis=-1)
        # E4M3's subnormals have the exponent of its smallest normal number; a zero counts for nothing.
        exponents = np.maximum(_exponent(left), -6) + np.maximum(_exponent(right), -6)
        exponents = np.concatenate([exponents, _exponent(total)[..., None]], axis=-1)
        top = np.where(terms == 0, -126, exponents).max(-1, keepdims=True)
        step = 2.0 ** (top - 13)
        total = (np.trunc(terms / step) * step).sum(-1)
        step = 2.0 ** (_exponent(total) - 13)
        total = np.trunc(total / step) * step
    return total


def _exponent(x):
    return np.frexp(x)[1].astype(np.float64) - 1

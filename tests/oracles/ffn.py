"""RMSNorm and the SwiGLU feed-forward network."""

import numpy as np
from jaxtyping import Float

from tests.oracles.tree import Tree, float64


def rms_norm(
    x: Float[np.ndarray, "*batch d"], gain: Float[np.ndarray, "d"], eps: float
) -> Float[np.ndarray, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis (arXiv 1910.07467, eq 4)."""
    x, gain = float64(x), float64(gain)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def sigmoid(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """1 / (1 + exp(-x)); tanh's form does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * float64(x)))


def swiglu(x: Float[np.ndarray, "*batch d"], p: Tree) -> Float[np.ndarray, "*batch d"]:
    """(silu(x W_gate) * (x W_up)) W_down (arXiv 2002.05202, eq 6), silu(z) = z sigmoid(z)."""
    x, p = float64(x), float64(p)
    gate = x @ p["w_gate"]
    return (gate * sigmoid(gate) * (x @ p["w_up"])) @ p["w_down"]

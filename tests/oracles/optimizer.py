"""AdamW with decoupled weight decay, and clipping by the global norm."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class AdamWState(NamedTuple):
    step: int  # Updates done.
    m: Arrays
    v: Arrays


def init(params: Mapping[str, np.ndarray]) -> AdamWState:
    zeros = {name: np.zeros(np.shape(p), np.float64) for name, p in params.items()}
    return AdamWState(0, zeros, dict(zeros))


def global_norm(grads: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm of all gradients as one vector."""
    return float(np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values())))


def clip(grads: Mapping[str, np.ndarray], limit: float) -> Arrays:
    """All gradients times min(1, limit / global norm) (arXiv 1211.5063, algorithm 1)."""
    norm = global_norm(grads)
    factor = 1.0 if norm <= limit else limit / norm
    return {name: np.asarray(g, np.float64) * factor for name, g in grads.items()}


def adamw(
    params: Mapping[str, np.ndarray],
    grads: Mapping[str, np.ndarray],
    state: AdamWState,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decayed: Mapping[str, bool] | None = None,
) -> tuple[Arrays, AdamWState]:
    """One update (arXiv 1711.05101, algorithm 2): theta -= lr (m^ / (sqrt(v^) + eps) + decay theta).

    `decayed` says which arrays decay; None means all. Clip the gradients before.
    """
    step = state.step + 1
    new, m, v = {}, {}, {}
    for name in params:
        theta, g = np.asarray(params[name], np.float64), np.asarray(grads[name], np.float64)
        m[name] = b1 * state.m[name] + (1 - b1) * g
        v[name] = b2 * state.v[name] + (1 - b2) * g * g
        update = (m[name] / (1 - b1**step)) / (np.sqrt(v[name] / (1 - b2**step)) + eps)
        if decayed is None or decayed[name]:
            update = update + weight_decay * theta
        new[name] = theta - lr * update
    return new, AdamWState(step, m, v)

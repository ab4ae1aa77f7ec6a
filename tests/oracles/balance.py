"""Load balance: the auxiliary losses, their measure, and the router bias that replaces them.

Every loss but the batch-wise one is averaged over the sequences. Weights (alpha) are the caller's.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tests.oracles.moe import top_indices
from tests.oracles.tree import float64

Scores = Float[np.ndarray, "batch seq experts"]
Selected = Int[np.ndarray, "batch seq top_k"]


def _load_fractions(selected: Int[np.ndarray, "tokens top_k"], experts: int) -> Float[np.ndarray, "experts"]:
    """f_i = N_r / (K T) * tokens that selected i: all ones under perfect balance."""
    tokens, top_k = selected.shape
    f = np.zeros(experts)
    for t in range(tokens):
        for i in selected[t]:
            f[i] += experts / (top_k * tokens)
    return f


def _v3_loss(scores: Float[np.ndarray, "tokens experts"], top_k: int) -> float:
    tokens, experts = scores.shape
    # Eq 18 counts the K highest of the plain scores: no bias and no group limit, unlike the routing itself.
    chosen = np.array([top_indices(scores[t], list(range(experts)), top_k) for t in range(tokens)])
    f = _load_fractions(chosen, experts)
    mean_share = np.zeros(experts)  # P, eq 20, of the shares s' of eq 19.
    for t in range(tokens):
        mean_share += scores[t] / np.sum(scores[t]) / tokens
    return float(f @ mean_share)


def sequence_loss(scores: Scores, top_k: int) -> float:
    """sum_i f_i P_i of each sequence, averaged (DeepSeek-V3 eqs 17-20, without alpha)."""
    return float(np.mean([_v3_loss(s, top_k) for s in float64(scores)]))


def batch_loss(scores: Scores, top_k: int) -> float:
    """The same sum with f and P over all tokens of the batch (DeepSeek-V3 §4.5.3, without alpha)."""
    scores = float64(scores)
    return _v3_loss(scores.reshape(-1, scores.shape[-1]), top_k)


def expert_loss(scores: Scores, selected: Selected) -> float:
    """sum_i f_i P_i with P_i = mean_t s_it (DeepSeek-V2 eqs 23-25, without alpha_1)."""
    losses = []
    for s, chosen in zip(float64(scores), selected, strict=True):
        losses.append(_load_fractions(chosen, s.shape[1]) @ np.mean(s, axis=0))
    return float(np.mean(losses))


def device_loss(scores: Scores, selected: Selected, n_groups: int) -> float:
    """sum_d f'_d P'_d: f' the mean f of device d's experts, P' the sum of their P (DeepSeek-V2 eqs 26-28).

    The experts of a device are one group, its `n_groups` in order; without alpha_2.
    """
    losses = []
    for s, chosen in zip(float64(scores), selected, strict=True):
        f = _load_fractions(chosen, s.shape[1]).reshape(n_groups, -1)
        mean_score = np.mean(s, axis=0).reshape(n_groups, -1)
        losses.append(sum(np.mean(f[d]) * np.sum(mean_score[d]) for d in range(n_groups)))
    return float(np.mean(losses))


def communication_loss(scores: Scores, selected: Selected, n_groups: int, topk_groups: int) -> float:
    """sum_d f''_d P''_d: f'' = D / (M T) * tokens sent to device d, P'' = P' (DeepSeek-V2 eqs 29-31).

    D = n_groups devices, M = topk_groups of them at most for a token; a token is sent once to a device,
    however many of its experts it selected; without alpha_3.
    """
    losses = []
    for s, chosen in zip(float64(scores), selected, strict=True):
        tokens, experts = s.shape
        f = np.zeros(n_groups)
        for t in range(tokens):
            for d in {int(i) // (experts // n_groups) for i in chosen[t]}:
                f[d] += n_groups / (topk_groups * tokens)
        mean_score = np.mean(s, axis=0).reshape(n_groups, -1)
        losses.append(sum(f[d] * np.sum(mean_score[d]) for d in range(n_groups)))
    return float(np.mean(losses))


def max_violation(counts: Int[np.ndarray, "experts"]) -> float:
    """MaxVio = max_i load_i / mean load - 1 (arXiv 2408.15664)."""
    return float(np.max(counts) / np.mean(counts) - 1)


def bias_after_steps(
    bias: Float[np.ndarray, "experts"], counts: Int[np.ndarray, "steps experts"], speeds: Sequence[float]
) -> Float[np.ndarray, "experts"]:
    """b += gamma * sign(mean_load - load) for each step (arXiv 2408.15664, algorithm 1; DeepSeek-V3 §2.1.2).

    counts[n] is the load of step n over the whole global batch: all shards, all micro-batches; speeds[n] is
    gamma at that step. A load exactly at the mean moves nothing.
    """
    bias = float64(bias).copy()
    for load, gamma in zip(counts, speeds, strict=True):
        mean = np.mean(load)
        for i in range(len(bias)):
            bias[i] += gamma * np.sign(mean - load[i])
    return bias

"""DeepSeekMoE: shared experts, group-limited routing steered by a bias (DeepSeek-V3 §2.1.2)."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tests.oracles.attention import softmax
from tests.oracles.ffn import sigmoid, swiglu
from tests.oracles.tree import Tree, float64


class Routing(NamedTuple):
    """Where each token went. `selected` is in falling order of score + bias, ties towards the lower index."""

    scores: Float[np.ndarray, "tokens experts"]  # s, without bias.
    selected: Int[np.ndarray, "tokens top_k"]
    gates: Float[np.ndarray, "tokens top_k"]  # Of the selected, in their order.
    counts: Int[np.ndarray, "experts"]


def top_indices(values: Float[np.ndarray, "n"], candidates: list[int], k: int) -> list[int]:
    """The k candidates of highest value, highest first, ties towards the lower index."""
    if k > len(candidates):
        raise ValueError(f"k={k} of {len(candidates)} candidates: choose k at most that")
    return sorted(candidates, key=lambda i: (-values[i], i))[:k]


def group_limited_top_k(
    biased: Float[np.ndarray, "experts"], top_k: int, n_groups: int, topk_groups: int, group_score: str
) -> list[int]:
    """The top_k experts by score + bias within the best `topk_groups` of `n_groups` groups.

    A group scores the sum of its two highest ("top2_sum", DeepSeek-V3 §2.1.2) or its highest ("max",
    DeepSeek-V2 §2.2.2). Experts of other groups are no candidates at all, which is a mask of -inf.
    """
    size = len(biased) // n_groups
    terms = {"top2_sum": 2, "max": 1}[group_score]
    group_scores = np.array([np.sum(np.sort(g)[::-1][:terms]) for g in np.reshape(biased, (n_groups, size))])
    groups = top_indices(group_scores, list(range(n_groups)), topk_groups)
    return top_indices(biased, [i for i in range(len(biased)) if i // size in groups], top_k)


def route(
    x: Float[np.ndarray, "tokens d"],
    w_router: Float[np.ndarray, "d experts"],
    bias: Float[np.ndarray, "experts"] | None = None,
    *,
    top_k: int,
    n_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    gate: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Selection by s + b, gates from s alone (DeepSeek-V3 eqs 13-16; softmax: DeepSeek-V2 eqs 21-22)."""
    x, w_router = float64(x), float64(w_router)
    tokens, experts = x.shape[0], w_router.shape[1]
    bias = np.zeros(experts) if bias is None else float64(bias)
    scores = np.zeros((tokens, experts))
    selected = np.zeros((tokens, top_k), np.int64)
    gates = np.zeros((tokens, top_k))
    counts = np.zeros(experts, np.int64)
    for t in range(tokens):
        logits = x[t] @ w_router
        scores[t] = {"sigmoid": sigmoid, "softmax": softmax}[gate](logits)
        selected[t] = group_limited_top_k(scores[t] + bias, top_k, n_groups, topk_groups, group_score)
        chosen = scores[t, selected[t]]
        gates[t] = scale * (chosen / np.sum(chosen) if normalize else chosen)
        for i in selected[t]:
            counts[i] += 1
    return Routing(scores, selected, gates, counts)


def moe(
    x: Float[np.ndarray, "tokens d"], p: Tree, **options: Any
) -> tuple[Float[np.ndarray, "tokens d"], Routing]:
    """sum_shared FFN_s(u) + sum_selected g_i FFN_i(u), and the routing; `options` are those of `route`.

    DeepSeek-V3 eq 12 without the residual u. No token is dropped, whatever the load.
    """
    x, p = float64(x), float64(p)
    routing = route(x, p["w_router"], p.get("bias"), **options)
    out = np.zeros(x.shape)
    for t in range(x.shape[0]):
        for expert in p.get("shared", []):
            out[t] += swiglu(x[t], expert)
        for i, g in zip(routing.selected[t], routing.gates[t], strict=True):
            out[t] += g * swiglu(x[t], p["experts"][i])
    return out, routing

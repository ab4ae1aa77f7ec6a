"""Multi-token prediction: V3's sequential chain, and the baseline of parallel heads.

Inputs are one sequence: tokens t_0 .. t_{S-1}, and targets[i] = t_{i+1}. Depth k (from 1) at position i
predicts t_{i+k+1} = targets[i+k]; the sequential kind reads t_{i+k} = targets[i+k-1], and as in eq 22 runs
over the first S-k positions, those whose target exists, so only they count towards its experts' load. Blocks
attend causally within segments, at the original positions.

Two choices where the paper is silent or the released weights decide:
- `eh_proj` takes the embedding first, [enorm(Emb(t_{i+k})); hnorm(h^{k-1}_i)]; the paper writes the hidden
  state first. h^0 is the main model's hidden state after its final norm. So do vLLM, SGLang, transformers.
- Depth k hands its block's output *after its own norm* to depth k+1: the vector that the head sees, as with
  h^0. SGLang and transformers do so; vLLM hands over the output before the norm, as eq 22 reads. The
  released weights have one depth and do not decide. The difference is that norm's gain (hnorm follows).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dsv3_jax.config import ModelConfig
from tests.oracles.attention import Hidden, Ids
from tests.oracles.ffn import rms_norm
from tests.oracles.moe import Routing
from tests.oracles.transformer import cross_entropy, head, layer
from tests.oracles.tree import Tree, float64

Tokens = Int[np.ndarray, "seq"]


class Depth(NamedTuple):
    """One depth: row i of its arrays is position i, of the first S-k (sequential) or S (parallel)."""

    logits: Float[np.ndarray, "rows vocab"]
    hidden: Float[np.ndarray, "rows d"]  # After this depth's norm.
    routing: Routing | None


def counted(k: int, segment_ids: Tokens, loss_mask: Bool[np.ndarray, "seq"]) -> Bool[np.ndarray, "rows"]:
    """Which of the first S-k positions count in the loss of depth k; k = 0 is the main model.

    Position i counts iff the token that it reads last, t_{i+k}, is of its own segment, and the target of that
    position is one to learn.
    """
    rows = range(len(loss_mask) - k)
    return np.array([segment_ids[i] == segment_ids[i + k] and loss_mask[i + k] for i in rows], bool)


def sequential(
    params: Tree,
    hidden: Hidden,
    targets: Tokens,
    config: ModelConfig,
    *,
    positions: Ids = None,
    segment_ids: Ids = None,
) -> list[Depth]:
    """The causal chain of D depths (DeepSeek-V3 eqs 21-23), from h^0 = `hidden`."""
    params, h = float64(params), float64(hidden)
    depths = []
    for k, p in enumerate(params["mtp"], start=1):
        rows = len(targets) - k
        joined = np.zeros((rows, p["eh_proj"].shape[1]))
        for i in range(rows):
            embedding = params["embed"][targets[i + k - 1]]
            e = rms_norm(embedding, p["enorm"], config.norm_eps)
            joined[i] = np.concatenate([e, rms_norm(h[i], p["hnorm"], config.norm_eps)]) @ p["eh_proj"]
        h, routing = layer(joined, p["block"], config, _first(positions, rows), _first(segment_ids, rows))
        h = rms_norm(h, p["norm"], config.norm_eps)
        depths.append(Depth(head(params, h), h, routing))
    return depths


def parallel(
    params: Tree, hidden: Hidden, config: ModelConfig, *, positions: Ids = None, segment_ids: Ids = None
) -> list[Depth]:
    """Independent blocks on the main model's `hidden`, no embedding, shared head (arXiv 2404.19737, §2)."""
    params = float64(params)
    depths = []
    for p in params["mtp"]:
        h, routing = layer(hidden, p["block"], config, positions, segment_ids)
        h = rms_norm(h, p["norm"], config.norm_eps)
        depths.append(Depth(head(params, h), h, routing))
    return depths


def depth_losses(
    depths: Sequence[Depth], targets: Tokens, segment_ids: Tokens, loss_mask: Bool[np.ndarray, "seq"]
) -> list[float]:
    """CE_k, the mean over the positions that count (eq 24 divides by S, whatever the depth)."""
    losses = []
    for k, depth in enumerate(depths, start=1):
        valid = counted(k, segment_ids, loss_mask)
        losses.append(cross_entropy(depth.logits[: len(valid)], targets[k:], valid))
    return losses


def mtp_loss(losses: Sequence[float], weight: float) -> float:
    """lambda / D * sum_k CE_k (eq 25)."""
    return weight / len(losses) * sum(losses)


def _first(ids: Ids, rows: int) -> Ids:
    return None if ids is None else ids[:rows]

"""Causal self-attention over one sequence: MLA in both its forms, and MHA, GQA, MQA."""

import numpy as np
from jaxtyping import Float, Int

from tests.oracles.ffn import rms_norm
from tests.oracles.rope import Rope, rotate
from tests.oracles.tree import Tree, float64

Hidden = Float[np.ndarray, "seq d"]
Ids = Int[np.ndarray, "seq"] | None


def visible(i: int, segment_ids: Ids) -> list[int]:
    """The positions that position i attends to: itself and those before it, of its own segment."""
    return [j for j in range(i + 1) if segment_ids is None or segment_ids[j] == segment_ids[i]]


def softmax(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


def attend(
    q: Float[np.ndarray, "seq heads qk"],
    k: Float[np.ndarray, "seq kv_heads qk"],
    v: Float[np.ndarray, "seq kv_heads v"],
    scale: float,
    segment_ids: Ids = None,
) -> Float[np.ndarray, "seq heads v"]:
    """o_i = sum_j softmax_j(q_i . k_j * scale) v_j (DeepSeek-V3 eq 10).

    Query head n reads key/value head n // (heads / kv_heads) (GQA, arXiv 2305.13245, §2.2).
    """
    q, k, v = float64(q), float64(k), float64(v)
    seq, heads, _ = q.shape
    queries_per_key = heads // k.shape[1]
    out = np.zeros((seq, heads, v.shape[2]))
    for n in range(heads):
        m = n // queries_per_key
        for i in range(seq):
            js = visible(i, segment_ids)
            weights = softmax(np.array([q[i, n] @ k[j, m] * scale for j in js]))
            for weight, j in zip(weights, js, strict=True):
                out[i, n] += weight * v[j, m]
    return out


def rotate_all(
    x: Float[np.ndarray, "seq heads dim"], positions: Ids, rope: Rope
) -> Float[np.ndarray, "seq heads dim"]:
    """Each head of position i rotated by positions[i] (by i when None)."""
    out = np.empty(x.shape)
    for i in range(x.shape[0]):
        for n in range(x.shape[1]):
            out[i, n] = rotate(x[i, n], i if positions is None else int(positions[i]), rope)
    return out


def heads_of(x: Float[np.ndarray, "seq in"], w: Float[np.ndarray, "in heads out"]):
    """x W for each head: [seq, heads, out]."""
    return np.stack([x @ w[:, n, :] for n in range(w.shape[1])], axis=1)


def merge_heads(o: Float[np.ndarray, "seq heads v"], w_o: Float[np.ndarray, "heads v d"]) -> Hidden:
    """u = W_O [o_1 .. o_h] (DeepSeek-V3 eq 11)."""
    return sum(o[:, n] @ w_o[n] for n in range(w_o.shape[0]))


def mla_queries(x: Hidden, p: Tree, rope: Rope, eps: float, positions: Ids = None):
    """q_C [seq, heads, nope] and q_R [seq, heads, rope] (DeepSeek-V3 eqs 6-8).

    Without `w_dq` the hidden state takes the place of the compressed query (DeepSeek-V2-Lite).
    """
    c_q = rms_norm(x @ p["w_dq"], p["q_norm"], eps) if "w_dq" in p else x
    q_c = heads_of(c_q, p["w_uq"] if "w_dq" in p else p["w_q"])
    return q_c, rotate_all(heads_of(c_q, p["w_qr"]), positions, rope)


def mla_cache(x: Hidden, p: Tree, rope: Rope, eps: float, positions: Ids = None):
    """What is cached: the normed latent c_KV [seq, kv_rank] and k_R [seq, rope] (DeepSeek-V3 eqs 1, 3)."""
    x, p = float64(x), float64(p)
    c_kv = rms_norm(x @ p["w_dkv"], p["kv_norm"], eps)
    return c_kv, rotate_all((x @ p["w_kr"])[:, None, :], positions, rope)[:, 0, :]


def mla_scale(p: Tree, rope: Rope) -> float:
    """(nope + rope)^-1/2 (DeepSeek-V3 eq 10), times YaRN's mscale^2."""
    return (p["w_uk"].shape[-1] + p["w_kr"].shape[-1]) ** -0.5 * rope.softmax_factor


def mla(
    x: Hidden, p: Tree, rope: Rope, *, eps: float = 1e-6, positions: Ids = None, segment_ids: Ids = None
) -> Hidden:
    """MLA with keys and values expanded from the latent (DeepSeek-V3 eqs 1-11); `rope` has width qk_rope."""
    x, p = float64(x), float64(p)
    q_c, q_r = mla_queries(x, p, rope, eps, positions)
    c_kv, k_r = mla_cache(x, p, rope, eps, positions)
    k_c = heads_of(c_kv, p["w_uk"])
    k_r = np.repeat(k_r[:, None, :], k_c.shape[1], axis=1)  # Eq 4: one rotated key, shared by the heads.
    q, k = np.concatenate([q_c, q_r], axis=-1), np.concatenate([k_c, k_r], axis=-1)
    o = attend(q, k, heads_of(c_kv, p["w_uv"]), mla_scale(p, rope), segment_ids)
    return merge_heads(o, p["w_o"])


def mla_absorbed(
    x: Hidden, p: Tree, rope: Rope, *, eps: float = 1e-6, positions: Ids = None, segment_ids: Ids = None
) -> Hidden:
    """MLA as multi-query attention over the cache: W_UK goes into the query, W_UV into the output.

    q_C . (W_UK c) = (W_UK^T q_C) . c and sum_j w_j (W_UV c_j) = W_UV (sum_j w_j c_j) (DeepSeek-V2 §2.1.2).
    """
    x, p = float64(x), float64(p)
    q_c, q_r = mla_queries(x, p, rope, eps, positions)
    c_kv, k_r = mla_cache(x, p, rope, eps, positions)
    scale = mla_scale(p, rope)
    out = np.zeros(x.shape)
    for n in range(q_c.shape[1]):
        for i in range(x.shape[0]):
            js = visible(i, segment_ids)
            q_latent = p["w_uk"][:, n, :] @ q_c[i, n]
            weights = softmax(np.array([(q_latent @ c_kv[j] + q_r[i, n] @ k_r[j]) * scale for j in js]))
            latent = sum(weight * c_kv[j] for weight, j in zip(weights, js, strict=True))
            out[i] += (latent @ p["w_uv"][:, n, :]) @ p["w_o"][n]
    return out


def gqa(x: Hidden, p: Tree, rope: Rope, *, positions: Ids = None, segment_ids: Ids = None) -> Hidden:
    """Grouped-query attention, every dimension rotated; MHA with as many key heads as heads, MQA with one.

    YaRN's softmax factor applies as in MLA: with the factor on cosine and sine it makes mscale(s, mscale)^2.
    """
    x, p = float64(x), float64(p)
    q = rotate_all(heads_of(x, p["w_q"]), positions, rope)
    k = rotate_all(heads_of(x, p["w_k"]), positions, rope)
    scale = q.shape[-1] ** -0.5 * rope.softmax_factor
    return merge_heads(attend(q, k, heads_of(x, p["w_v"]), scale, segment_ids), p["w_o"])

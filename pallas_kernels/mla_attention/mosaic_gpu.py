"""Attention for Hopper GPUs in Pallas Mosaic GPU: which calls it takes, padding, the order of the kernels.

The kernels are in `mosaic_gpu_forward`, `mosaic_gpu_backward` (dK, dV) and `mosaic_gpu_queries` (dQ).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import implementations

MINIMUM_JAX = (0, 11, 2)
WORKSPACE = 2 << 30
# Up to so many times the backward kernels are compiled for a part of the heads each; beyond, once, in a loop.
_UNROLLED = 8
_MULTIPROCESSORS = 132  # of an H100 or H200, for compilation away from the card


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del k_rope, q_segments, kv_segments, causal
    if jax.__version_info__ < MINIMUM_JAX:
        return f"JAX {jax.__version__} is older than 0.11.2; install the gpu extra, or use 'chunked'"
    if implementations.platform() != "gpu":
        return "it is written for Hopper GPUs; use 'chunked' or 'reference'"
    if not on_hopper():
        return "the GPU is not of the Hopper generation (compute capability 9.0); use 'cudnn' or 'chunked'"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; it takes bfloat16; use 'chunked'"
    if 0 in q.shape or 0 in k.shape:
        return "an empty axis; use 'chunked'"
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if d_qk % 64 or d_v % 64 or not (64 <= d_v <= 128 and d_v <= d_qk <= 192):
        taken = "multiples of 64, at most 192 for queries and keys and 128 for values, these not the wider"
        return f"widths {d_qk} and {d_v}; it takes {taken}; use 'chunked'"
    return None


@functools.cache
def _gpus():
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:
        return []


def on_hopper() -> bool:
    """True as well without any GPU: then another machine's is compiled for."""
    return all(device.compute_capability == "9.0" for device in _gpus())


def multiprocessors() -> int:
    return _gpus()[0].core_count if _gpus() else _MULTIPROCESSORS


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal, config=None, workspace=WORKSPACE):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`.

    `config` gives the tiles of the forward kernel; `workspace` the bytes that the backward pass may take for
    dS of some heads at a time (less than one head needs: dS is recomputed).
    """
    if scale <= 0:  # The kernels fold a positive scale into the exponent.
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    if k_rope is not None and (k.shape[-1] % 64 or k_rope.shape[-1] % 64):
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        k, k_rope = jnp.concatenate([k, shared], -1), None
    return _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, config, workspace)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, k_rope, q_segments, kv_segments, *static):
    return _forward(q, k, v, k_rope, q_segments, kv_segments, *static)[0]


def _pad_rows(array, multiple):
    if array is None:
        return None
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % multiple)] + [(0, 0)] * (array.ndim - 2))


def _call(q, k, v, scale, causal):
    from pallas_kernels.mla_attention import mosaic_gpu_call, mosaic_gpu_common

    return mosaic_gpu_call.Call(
        *(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], causal, scale),
        *(k.shape[3], q.shape[3], v.shape[3], mosaic_gpu_common.loader_threads(q)),
    )


def _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, config, workspace):
    del workspace
    from pallas_kernels.mla_attention import mosaic_gpu_call, mosaic_gpu_forward
    from pallas_kernels.mla_attention.mosaic_gpu_common import TILE

    call = _call(q, k, v, scale, causal)
    config = config or mosaic_gpu_forward.default_config(call.d_qk, call.d_v)
    ranges = None
    if q_segments is not None:
        visible = mosaic_gpu_call.visible_blocks(call, q_segments, kv_segments, config.block_kv)
        ranges = mosaic_gpu_call.ranges(*visible)
    # TMA moves boxes of 8 rows; what it reads beyond the operands' ends is zero.
    out, lse = mosaic_gpu_forward.forward(
        *(_pad_rows(array, 8) for array in (q, k, v, k_rope)),
        _pad_rows(q_segments, TILE),
        _pad_rows(kv_segments, config.block_kv),
        ranges,
        call=call,
        config=config,
        multiprocessors=multiprocessors(),
    )
    out, lse = out[:, : call.q_len], lse[..., : call.q_len]
    # Named, so that a recomputation policy can keep them: then the backward pass does not come here again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, k_rope, q_segments, kv_segments, out, lse)


def _backward(scale, causal, config, workspace, saved, cotangents):
    del config
    from pallas_kernels.mla_attention import mosaic_gpu_backward

    q, k, v, k_rope, *_ = saved
    call = _call(q, k, v, scale, causal)
    operands, by_query, by_key = _backward_operands(call, saved, cotangents)
    # dS of as many heads at a time as the workspace holds.
    dS = 2 * call.batch * call.group * call.q_tiles * call.kv_tiles * mosaic_gpu_backward.TILE**2
    with_scores = dS <= workspace
    most = min(call.kv_heads, workspace // dS) if with_scores else call.kv_heads
    count = next(n for n in range(most, 0, -1) if call.kv_heads % n == 0)
    some_heads = functools.partial(_some_heads, by_query=by_query, by_key=by_key, with_scores=with_scores)
    if call.kv_heads <= _UNROLLED * count:
        parts = [some_heads(operands, call, (first, count)) for first in range(0, call.kv_heads, count)]
        dq, dk, dv, d_rope = zip(*parts, strict=True)
        shared = None if k_rope is None else sum(d_rope)
        dq, dk, dv = (jnp.concatenate(part, 2) for part in (dq, dk, dv))
    else:
        dq, dk, dv, shared = _in_a_loop(some_heads, operands, call, count)
    return dq, dk, dv, None if k_rope is None else shared.astype(k_rope.dtype), None, None


def _some_heads(operands, call, heads, by_query, by_key, with_scores):
    """dQ, dK, dV of some key heads and their query heads, and their share of the shared key's gradient."""
    from pallas_kernels.mla_attention import mosaic_gpu_backward, mosaic_gpu_queries

    dk, dv, d_rope, scores = mosaic_gpu_backward.keys_values(
        operands._replace(ranges=by_key), call=call, heads=heads, with_scores=with_scores
    )
    if with_scores:
        dq = mosaic_gpu_queries.from_scores(
            scores, operands.k, operands.k_rope, by_query, call=call, heads=heads
        )
    else:
        dq = mosaic_gpu_queries.recomputed(operands._replace(ranges=by_query), call=call)
    d_rope = None if d_rope is None else d_rope[:, : call.kv_len].sum(2, dtype=jnp.float32)
    return dq[:, : call.q_len], dk[:, : call.kv_len], dv[:, : call.kv_len], d_rope


def _in_a_loop(some_heads, operands, call, count):
    """`count` key heads at a time, copied out for kernels that are compiled once."""
    some = call._replace(heads=count * call.group, kv_heads=count)

    def cut(array, i, axis):
        size = count * (array.shape[axis] // call.kv_heads)
        return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis)

    def body(i, sums):
        *whole, shared = sums
        by_head = {name: cut(getattr(operands, name), i, 2) for name in ("q", "k", "v", "d_out")}
        by_head |= {name: cut(getattr(operands, name), i, 1) for name in ("shift", "delta")}
        *parts, d_rope = some_heads(operands._replace(**by_head), some, (0, count))
        whole = [
            jax.lax.dynamic_update_slice_in_dim(array, part, i * part.shape[2], 2)
            for array, part in zip(whole, parts, strict=True)
        ]
        return *whole, None if shared is None else shared + d_rope

    q, k, v, k_rope = operands.q, operands.k, operands.v, operands.k_rope
    # Zeros like the operands, whose manual mesh axes they need.
    start = [jnp.zeros_like(q[:, : call.q_len]), *(jnp.zeros_like(x[:, : call.kv_len]) for x in (k, v))]
    shared = None if k_rope is None else jnp.zeros_like(k_rope[:, : call.kv_len], jnp.float32)
    return jax.lax.fori_loop(0, call.kv_heads // count, body, (*start, shared))


def _backward_operands(call, saved, cotangents):
    """What the backward kernels read, and the block ranges by query tile and by key tile."""
    from pallas_kernels.mla_attention import mosaic_gpu_call
    from pallas_kernels.mla_attention.mosaic_gpu_backward import TILE, Operands

    q, k, v, k_rope, q_segments, kv_segments, out, lse = saved
    d_out, d_lse = cotangents
    # d logits = p * (d p - delta), and the log-sum-exp's own gradient adds p * d_lse.
    delta = jnp.einsum("bshd,bshd->bhs", out, d_out, preferred_element_type=jnp.float32) - d_lse
    missing = ((0, 0), (0, 0), (0, -call.q_len % TILE))
    shift = jnp.where(lse == -jnp.inf, -jnp.inf, (lse + math.log(mosaic_gpu_call.UNIT)) * (-1 / call.scale))
    operands = Operands(
        *(_pad_rows(array, 8) for array in (q, k, v, k_rope, d_out)),
        jnp.pad(shift, missing, constant_values=-jnp.inf),
        jnp.pad(-delta, missing),
        _pad_rows(q_segments, TILE),
        _pad_rows(kv_segments, TILE),
        None,
    )
    if q_segments is None:
        return operands, None, None
    visible = functools.partial(mosaic_gpu_call.visible_blocks, call, q_segments, kv_segments)
    by_query = mosaic_gpu_call.ranges(*visible(mosaic_gpu_call.BLOCK))
    some, whole = visible(TILE)
    # dS is read in all blocks between a query tile's first and last: there it must have been written.
    some = mosaic_gpu_call.between(some)
    return operands, by_query, mosaic_gpu_call.ranges(some.swapaxes(1, 2), whole.swapaxes(1, 2))


_attention.defvjp(_forward, _backward)

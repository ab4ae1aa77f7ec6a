"""Attention through cuDNN, as JAX binds it. Hopper GPUs or newer, bf16 and fp16.

`jax.nn.dot_product_attention` refuses value heads narrower than query heads in its own shape check;
the function beneath it, private to JAX, accepts them. The shared RoPE key is copied to every head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import implementations


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del k_rope, kv_segments
    if implementations.platform() != "gpu":
        return "cuDNN runs on GPUs; use 'chunked' or 'reference'"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cuDNN takes all three bfloat16 or all float16"
    if q_segments is not None:
        return "cuDNN's packed layout takes document boundaries, not segment ids; use 'chunked'"
    if causal and q.shape[1] != k.shape[1]:
        lengths = f"q_len {q.shape[1]} must equal kv_len {k.shape[1]}"
        return f"its causal mask aligns the starts, so {lengths}; use 'chunked'"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"q_len {q.shape[1]}, kv_len {k.shape[1]}: its backward pass takes even lengths; use 'chunked'"
    if 0 in q.shape or 0 in k.shape:
        return "an empty axis; use 'chunked'"
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if not (d_qk == d_v and d_qk <= 128 and d_qk % 8 == 0 or (d_qk, d_v) == (192, 128)):
        taken = "it takes 192 and 128, or equal multiples of 8 up to 128"
        return f"widths {d_qk} and {d_v}; {taken}; use 'chunked'"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Why cuDNN is out of reach on this machine: not installed, too old, or the GPU is."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    try:
        version = fused.check_cudnn_version()
    except RuntimeError:
        return "cuDNN is not installed; install jax[cuda13], or use 'chunked'"
    if version < 91000:
        return f"cuDNN {version} is older than 91000; update it, or use 'chunked'"
    if not fused.check_compute_capability("9.0"):
        return "the GPU is older than Hopper; use 'chunked'"
    return None


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`."""
    del q_segments, kv_segments

    if k_rope is not None:
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        k = jnp.concatenate([k, shared], -1)
    results: Any = _attention(q, k, v, scale, causal)
    out, lse = results
    return out, without_gradient(lse, None, "cudnn")


def _options(causal):
    """The static arguments of JAX's rules between `scale` and `return_residual`."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    seed, dropout, bias = 42, 0.0, (False, False)
    return seed, dropout, bias, mask, fused.AttentionLayout.BTNH.value, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, scale, causal):
    return _forward(q, k, v, scale, causal)[0]


def _forward(q, k, v, scale, causal):
    """JAX's own rule, its residuals named: else recomputation policies could not keep them."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    absent = [jnp.zeros(0, q.dtype)] * 7  # bias, lengths, offsets, page tables
    version = fused.check_cudnn_version()
    rule: Any = fused._dot_product_attention_fwd_rule
    results, saved = rule(q, k, v, *absent, scale, *_options(causal), version, True)
    out, lse = checkpoint_name(results[0], "attention_out"), checkpoint_name(results[1], "attention_lse")
    return (out, lse), (*saved[:-2], lse, out)


def _backward(scale, causal, saved, cotangents):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused._dot_product_attention_bwd_rule(scale, *_options(causal), None, True, saved, cotangents)[:3]


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def without_gradient(lse, source, implementation):
    """The log-sum-exp of an implementation that does not differentiate it: asking for its gradient raises.

    `source` is what it was computed from, whose gradient it would be; None where `lse` itself depends on it.
    """
    del source, implementation
    return lse


def _without_gradient_forward(lse, source, implementation):
    del source, implementation
    return lse.value, None


def _without_gradient_backward(implementation, _, d_lse):
    if isinstance(d_lse, jax.custom_derivatives.SymbolicZero):
        return d_lse, None
    # JAX's bindings drop this cotangent: a wrong gradient if it went unnoticed.
    raise implementations.UnsupportedError(
        f"mla_attention: implementation={implementation!r} has no gradient through the log-sum-exp; "
        "use 'chunked', or jax.lax.stop_gradient(lse)"
    )


without_gradient.defvjp(_without_gradient_forward, _without_gradient_backward, symbolic_zeros=True)

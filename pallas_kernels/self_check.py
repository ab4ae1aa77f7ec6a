"""A check of the attention kernels that `"auto"` chooses here, on small random inputs, before real work.

A kernel that a compiler or driver makes wrong on this GPU would otherwise show as a loss that does not fall.
`PALLAS_SELF_CHECK=0` in the environment leaves the check out.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import platform
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.shapes import quantise

# Norm of the error over that of the result: bf16 operands and results leave 2e-3 to 4e-3.
TOLERANCE = 1e-2
_LENGTH = 200  # Beyond one tile of any kernel, and off its end.


class SelfCheckError(RuntimeError):
    """A kernel's result is not the reference's."""


def self_check(
    *,
    heads: int = 2,
    d_nope: int = 128,
    d_rope: int = 64,
    d_v: int = 128,
    rank: int = 512,
    cache: str = "bfloat16",
    implementation: str = "auto",
) -> dict[str, float]:
    """Compares `mla_attention`, its gradients and `mla_decode` in bf16 with the references in float32.

    Args:
      heads, d_nope, d_rope, d_v, rank: widths of the model at hand; they decide which kernel is chosen.
      cache: dtype of the cache that decoding reads: "bfloat16", "int8" or "float8_e4m3fn".
      implementation: what to check; `"auto"` is what the model will use.

    Returns:
      The relative error (norm) of each result; nothing when switched off.

    Raises:
      SelfCheckError: an error is above `TOLERANCE`, or not a number.
    """
    if os.environ.get("PALLAS_SELF_CHECK", "1") == "0":
        return {}
    errors = _attention(heads, d_nope, d_rope, d_v, implementation)
    errors |= _decode(heads, d_rope, rank, cache, implementation)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        found = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        where = f"{platform()} ({jax.devices()[0].device_kind}, JAX {jax.__version__})"
        raise SelfCheckError(
            f"kernels (implementation={implementation!r}) on {where} differ from the reference: {found}; "
            f"rounding explains {TOLERANCE:.0e}. Choose another implementation ('chunked' for attention, "
            "'blocked' for decoding), or set "
            "PALLAS_SELF_CHECK=0 to go on regardless."
        )
    return errors


def _error(got, want) -> float:
    got, want = (jnp.where(jnp.isfinite(want), x, 0).astype(jnp.float32) for x in (got, want))
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _attention(heads, d_nope, d_rope, d_v, implementation):
    q, k = _normal(0, 1, _LENGTH, heads, d_nope + d_rope), _normal(1, 1, _LENGTH, heads, d_nope)
    v, rope = _normal(2, 1, _LENGTH, heads, d_v), _normal(3, 1, _LENGTH, d_rope)
    d_out = _normal(4, 1, _LENGTH, heads, d_v)

    def both(name):
        def f(q, k, v, rope):
            return mla_attention(q, k, v, k_rope=rope, return_lse=True, implementation=name)

        def run(d_out, *operands):
            vjp: Any = jax.vjp  # Its types do not know `has_aux` beside several operands.
            out, pullback, lse = vjp(f, *operands, has_aux=True)
            return out, lse, *pullback(d_out)

        return jax.jit(run)

    exact = both("reference")(*(x.astype(jnp.float32) for x in (d_out, q, k, v, rope)))
    names = ("output", "log-sum-exp", "dq", "dk", "dv", "dk_rope")
    results = both(implementation)(d_out, q, k, v, rope)
    return {f"mla_attention {n}": _error(a, b) for n, a, b in zip(names, results, exact, strict=True)}


def _decode(heads, d_rope, rank, cache, implementation):
    capacity = -(-_LENGTH // 8) * 8
    q, c_kv = _normal(5, 2, 1, heads, rank + d_rope), _normal(6, 2, capacity, rank)
    k_rope, lengths = _normal(7, 2, capacity, d_rope), jnp.array([_LENGTH, 77], jnp.int32)
    factors = {}
    if cache != "bfloat16":
        c_kv, factors["c_kv_scale"] = quantise(c_kv, cache)
        k_rope, factors["k_rope_scale"] = quantise(k_rope, cache)

    def run(name, *operands):
        f = functools.partial(mla_decode, scale=(rank + d_rope) ** -0.5, implementation=name)
        return jax.jit(f)(*operands, lengths, **factors)

    # The reference takes codes as they are, and computes in float32.
    exact = run("reference", q.astype(jnp.float32), c_kv, k_rope)
    results = run(implementation, q, c_kv, k_rope)
    names = ("output", "log-sum-exp")
    return {f"mla_decode {n}": _error(a, b) for n, a, b in zip(names, results, exact, strict=True)}

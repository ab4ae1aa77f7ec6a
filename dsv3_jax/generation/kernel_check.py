"""A check of the kernels that generation will use, on small random inputs, before the first request.

Kernels that a compiler or driver makes wrong on this GPU would otherwise show as text that makes no sense.
`PALLAS_SELF_CHECK=0` in the environment leaves the check out.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation.cache import DTYPES, quantise
from pallas_kernels import grouped_matmul, implementations, mla_attention, mla_decode
from pallas_kernels.gather_matvec import gather_matvec
from pallas_kernels.self_check import TOLERANCE, SelfCheckError

_POSITIONS = 200  # Beyond one tile of any kernel, and off its end.
_ROWS = 24


def check_kernels(config: ModelConfig, dtype: Any, cache_dtype: str) -> dict[str, float]:
    """Compares the products and the attention of a model of these widths with the references in float32.

    Once for each model in a process, and only on accelerators: elsewhere plain JAX runs.

    Args:
      config: the model.
      dtype: of weights and activations.
      cache_dtype: of the cache, a key of `cache.DTYPES`.

    Returns:
      The relative error (norm) of each result; nothing where there is nothing to check.

    Raises:
      SelfCheckError: an error is above what rounding explains, or not a number.
    """
    narrow = jnp.dtype(dtype) == jnp.bfloat16 and cache_dtype in ("bf16", "fp8", "int8")
    off = os.environ.get("PALLAS_SELF_CHECK", "1") == "0"
    if off or not narrow or implementations.platform() == "cpu" or config.attention.kind != "mla":
        return {}
    return compare(config, "auto", cache_dtype)


@functools.cache
def compare(config: ModelConfig, implementation: str, cache_dtype: str = "bf16") -> dict[str, float]:
    """`check_kernels` of one implementation, wherever it runs."""
    errors = {}
    for name, (call, arrays, fixed) in _calls(config, cache_dtype).items():
        wide = [x.astype(jnp.float32) for x in arrays]
        with implementations.one_device():
            found = jax.jit(functools.partial(call, implementation=implementation))(*arrays, *fixed)
        exact = jax.jit(functools.partial(call, implementation="reference"))(*wide, *fixed)
        found = found.astype(jnp.float32)
        errors[name] = float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise SelfCheckError(
            f"kernels (implementation={implementation!r}) on {jax.devices()[0].device_kind} with JAX "
            f"{jax.__version__} differ from the reference: {listed}; rounding explains {TOLERANCE:.0e}. "
            "Generate with --dtype fp32, or set PALLAS_SELF_CHECK=0 to go on regardless."
        )
    return errors


def _calls(
    config: ModelConfig, cache_dtype: str
) -> dict[str, tuple[Callable[..., Any], list[Any], list[Any]]]:
    """(call, bf16 arrays, others) of each operation, at widths that decide which kernel is chosen."""
    a, m, heads = config.attention, config.moe, min(config.attention.n_heads, 8)
    width, scale = a.kv_lora_rank + a.qk_rope_head_dim, (a.qk_nope_head_dim + a.qk_rope_head_dim) ** -0.5
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def attention(q: Any, k: Any, v: Any, rope: Any, implementation: str) -> Any:
        return mla_attention(q, k, v, k_rope=rope, implementation=implementation)

    def decoding(q: Any, c_kv: Any, rope: Any, lengths: Any, *scales: Any, implementation: str) -> Any:
        options: dict[str, Any] = {"alike": config.mtp.depth > 0}  # As `linear.rows_of`.
        if scales:
            options |= zip(("c_kv_scale", "k_rope_scale"), scales, strict=True)
        return mla_decode(q, c_kv, rope, lengths, scale=scale, implementation=implementation, **options)[0]

    q = normal(1, _POSITIONS, heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
    k, v = normal(1, _POSITIONS, heads, a.qk_nope_head_dim), normal(1, _POSITIONS, heads, a.v_head_dim)
    cached = normal(2, _POSITIONS, a.kv_lora_rank), normal(2, _POSITIONS, a.qk_rope_head_dim)
    lengths = jnp.array([_POSITIONS, 77], jnp.int32)
    codes, scales = zip(*(quantise(x, DTYPES[cache_dtype]) for x in cached), strict=True)
    query = normal(2, 1, heads, width)
    if scales[0] is None:
        decoded = [query, *cached], [lengths]
    else:  # Codes stay codes where others are compared in float32.
        decoded = [query], [*codes, lengths, *scales]
    calls: dict[str, Any] = {
        "mla_attention": (attention, [q, k, v, normal(1, _POSITIONS, a.qk_rope_head_dim)], []),
        "mla_decode": (decoding, *decoded),
        "gather_matvec": (
            gather_matvec,
            [normal(2, config.d_model), normal(3, config.d_model, width)],
            [jnp.array([2, 0], jnp.int32)],
        ),
    }
    if m.n_dense_layers < config.n_layers:
        matrices = normal(3, config.d_model, 2 * m.d_ff_expert)
        sizes = jnp.array([7, 0, _ROWS - 7], jnp.int32)
        calls["grouped_matmul"] = (grouped_matmul, [normal(_ROWS, config.d_model), matrices], [sizes])
    return calls

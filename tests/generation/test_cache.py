"""What the cache costs and what its dtypes lose."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cache_bytes import allocated, formula, presets
from dsv3_jax.generation.cache import DTYPES, bytes_per_token, dequantise, quantise
from tests.generation.models import CONFIGS
from tests.generation.test_forward import decoded


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_a_token(dtype):
    """The arrays of every preset hold what the papers' formulas say, and two scales when quantised."""
    for config in [*presets().values(), *CONFIGS.values()]:
        size = jnp.dtype(DTYPES[dtype]).itemsize
        streams = 1 if config.attention.kind == "mla" else formula(config) // config.n_layers
        if config.attention.kind != "mla":
            streams //= 2 * config.attention.head_dim
        scales = 8 * config.n_layers * streams if dtype in ("fp8", "int8") else 0
        assert allocated(config, dtype) == formula(config) * size + scales == bytes_per_token(config, dtype)


def test_the_papers_reduction():
    """DeepSeek-V2 §1: 93.3% less than DeepSeek 67B, at about 6 bits an element (§3.2.3)."""
    models = presets()
    assert round(1 - formula(models["v2_236b"]) * 6 / (formula(models["llm_67b"]) * 16), 3) == 0.933


# Half a unit in the last place relative to the vector's largest: bf16 keeps 8 bits, int8 127 steps, e4m3
# 4 bits relative to the number itself.
@pytest.mark.parametrize(("dtype", "step"), [("bf16", 2**-8), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_quantisation(dtype, step):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 32)) * np.exp(rng.normal(0, 3, (50, 1)))).astype(np.float32)
    x[7] = 0
    back = dequantise(*quantise(jnp.asarray(x), DTYPES[dtype]), jnp.float32)
    size = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(back - x) <= 1.01 * step * size).all()
    np.testing.assert_array_equal(back[7], 0)


# Root mean square of the error over that of the logits, as found, and rounded up by about a half.
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.007), ("int8", 0.035), ("fp8", 0.14)])
def test_logits_from_a_narrow_cache(dtype, bound):
    found, expected = decoded("v3", dtype, 4)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < bound


def test_logits_of_narrow_weights():
    """All in bf16. The median over positions: where two experts nearly tie, rounding may take the other."""
    found, expected = decoded("v3", "bf16", 4, weights_dtype=jnp.bfloat16)
    error = np.sqrt(np.mean((found - expected) ** 2, -1) / np.mean(expected**2, -1))
    assert 0 < np.median(error) < 0.03

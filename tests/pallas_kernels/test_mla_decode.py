"""`mla_decode` against the equations in float64 numpy, for every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode import blocked

RANK, ROPE, SCALE = 24, 8, 0.2

# batch, s_q, heads, page size (None: contiguous), capacity, lengths
CASES = {
    "one": (1, 1, 4, None, 16, [7]),
    "ragged": (4, 1, 3, None, 40, [40, 1, 0, 17]),
    "speculation": (3, 4, 2, None, 33, [33, 4, 19]),
    "shorter than the queries": (2, 3, 2, None, 9, [1, 2]),
    "nothing at all": (2, 1, 2, None, 8, [0, 0]),
    "paged": (3, 1, 4, 4, 20, [20, 3, 9]),
    "paged speculation": (2, 2, 2, 6, 30, [13, 0]),
    "page larger than a block": (1, 1, 2, 16, 32, [18]),
}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make(name, cache_dtype=jnp.float32, dtype=jnp.float32, seed=0):
    """Arguments of `mla_decode`, and the cache `[batch, capacity, width]` that they mean, in float64."""
    batch, s_q, heads, page, capacity, lengths = CASES[name]
    rng = np.random.default_rng(seed)
    q = jnp.asarray(normal(rng, batch, s_q, heads, RANK + ROPE), dtype)
    rows, slots = (batch, capacity) if page is None else (2 * batch * capacity // page, page)
    options, caches, meant = {}, [], []
    for width, label in ((RANK, "c_kv_scale"), (ROPE, "k_rope_scale")):
        cache = jnp.asarray(normal(rng, rows, slots, width) * (20 if cache_dtype == jnp.int8 else 1))
        cache = (jnp.round(cache) if cache_dtype == jnp.int8 else cache).astype(cache_dtype)
        value = np.asarray(cache.astype(jnp.float32), np.float64)
        if cache_dtype in (jnp.int8, jnp.float8_e4m3fn):
            scales = rng.uniform(0.02, 0.1, (rows, slots)).astype(np.float32)
            options[label] = jnp.asarray(scales)
            value = value * scales[..., None]
        caches.append(cache)
        meant.append(value)
    if page is not None:
        table = rng.permutation(rows)[: batch * capacity // page].reshape(batch, -1).astype(np.int32)
        meant = [value[table].reshape(batch, capacity, -1) for value in meant]
        used = -(-np.array(lengths) // page)
        table[np.arange(table.shape[1]) >= used[:, None]] = 10**6  # No page: must not be read.
        options["page_table"] = jnp.asarray(table)
    return (q, *caches, jnp.asarray(lengths, jnp.int32)), options, meant


def float64(q, lengths, values, rope, scale=SCALE):
    q, lengths = np.asarray(q.astype(jnp.float32), np.float64), np.asarray(lengths)
    out = np.zeros((*q.shape[:3], values.shape[-1]))
    lse = np.full(q.shape[:3], -np.inf)
    for row, j in np.ndindex(q.shape[:2]):
        seen = lengths[row] - q.shape[1] + j + 1
        if seen <= 0:
            continue
        logits = q[row, j] @ np.concatenate([values[row], rope[row]], -1)[:seen].T * scale
        peak = logits.max(-1, keepdims=True)
        weights = np.exp(logits - peak)
        total = weights.sum(-1, keepdims=True)
        out[row, j] = weights / total @ values[row, :seen]
        lse[row, j] = (np.log(total) + peak)[:, 0]
    return out, lse


def run(operands, options, implementation):
    return jax.jit(lambda *a, **o: mla_decode(*a, scale=SCALE, implementation=implementation, **o))(
        *operands, **options
    )


@pytest.fixture(params=["reference", "blocked"])
def implementation(request, monkeypatch):
    # In small blocks, so that small cases take several.
    monkeypatch.setattr(blocked.attention, "__kwdefaults__", {"block": 8})
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_against_the_equations(name, implementation):
    operands, options, meant = make(name)
    out, lse = run(operands, options, implementation)
    want_out, want_lse = float64(operands[0], operands[3], *meant)
    # float32 rounding of sums of some 40 terms of size 1.
    np.testing.assert_allclose(out, want_out, rtol=0, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["ragged", "paged speculation"])
@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_caches_of_every_dtype(name, cache_dtype, implementation):
    operands, options, meant = make(name, cache_dtype)
    out, lse = run(operands, options, implementation)
    want_out, want_lse = float64(operands[0], operands[3], *meant)
    # Codes and bf16 are exact in float32, in which q comes.
    np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)


def test_bfloat16_queries(implementation):
    operands, options, meant = make("ragged", jnp.int8, jnp.bfloat16)
    out, lse = run(operands, options, implementation)
    want_out, want_lse = float64(operands[0], operands[3], *meant)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Weights and output are rounded to 8 bits each; values reach 6.
    np.testing.assert_allclose(out.astype(jnp.float32), want_out, rtol=0, atol=6 * 2**-8)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)


def test_the_loop_ends_with_the_longest_sequence():
    """Blocks beyond it are not read: NaN there does no harm, though it would if read and masked."""
    (q, c_kv, k_rope, lengths), options, _ = make("ragged")
    lengths = jnp.minimum(lengths, 8)
    poisoned = c_kv.at[:, 8:].set(jnp.nan)
    absent = (None, None, None)
    attention = jax.jit(lambda q, *cache: blocked.attention(q, *cache, *absent, scale=SCALE, block=8))
    out, _ = attention(q, poisoned, k_rope, lengths)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 1, 4, RANK)}, "query width 24"),
        ({"lengths": (2,)}, r"lengths \(2,\) must be \[batch\]"),
        ({"c_kv": (2, 16, RANK), "k_rope": (2, 16, ROPE)}, "pass page_table"),
        ({"k_rope": (1, 15, ROPE)}, "same rows, slots and dtype"),
        ({"c_kv_scale": (1, 16)}, "those only; this is float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (1, 1, 4, RANK + ROPE), "c_kv": (1, 16, RANK), "k_rope": (1, 16, ROPE)} | change
    lengths = jnp.ones(shapes.pop("lengths", (1,)), jnp.int32)
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    unchecked = getattr(mla_decode, "__wrapped__", mla_decode)  # Without the tests' own check of shapes.
    with pytest.raises(ValueError, match=message):
        unchecked(**arrays, lengths=lengths, scale=SCALE)

"""Prefill and decoding against the training forward over the whole text, position by position."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.generation import forward, linear, programs
from dsv3_jax.generation.cache import init_cache
from dsv3_jax.generation.experts import moe
from dsv3_jax.generation.prefill import prefill
from dsv3_jax.generation.weights import prepare
from dsv3_jax.model import Transformer
from pallas_kernels import target_platform
from tests.generation.models import CONFIGS, teacher_forced, variables
from tests.model.test_transformer import changed, make_variables

LENGTHS = np.array([5, 17, 12], np.int32)
STEPS = 6
PAGE = 4


@functools.cache
def weights(name, dtype=jnp.float32, merge_shared=None):
    made = jax.jit(prepare, static_argnums=(1, 2, 3))
    return made(variables(name), CONFIGS[name], jnp.dtype(dtype), merge_shared)


decode = jax.jit(forward.decode, static_argnames="config")


def logits_of(name, hidden):
    return np.asarray(jnp.matmul(hidden.astype(jnp.float32), weights(name).head, precision="highest"))


def ragged(name):
    rng = np.random.default_rng(5)
    texts = rng.integers(0, CONFIGS[name].vocab_size, (3, 40)).astype(np.int32)
    prompts = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], texts[:, : LENGTHS.max()], 0)
    return texts, prompts


def shuffled_pages(cache):
    """Every sequence's pages in an order of their own, and none in use twice."""
    order = np.random.default_rng(0).permutation(cache.page_table.size)
    return replace(cache, page_table=jnp.asarray(order.reshape(cache.page_table.shape), jnp.int32))


def decoded(name, dtype, page_size, seq=1, chunk=16, weights_dtype=jnp.float32):
    """The logits of STEPS rounds of `seq` tokens after each prompt, and those of the forward."""
    config = CONFIGS[name]
    texts, prompts = ragged(name)
    cache = init_cache(config, 3, 40, dtype, page_size=page_size)
    if page_size:
        cache = shuffled_pages(cache)
    read = weights(name, weights_dtype)
    cache, last = prefill(read, cache, prompts, LENGTHS, config, chunk=chunk, drafts=0)
    found, expected = [logits_of(name, last[:, -1])], []
    for i in range(STEPS):
        at = LENGTHS[:, None] + i * seq + np.arange(seq)
        new = np.take_along_axis(texts, at, axis=1)
        _, logits, cache = decode(read, cache, new, np.ones(3, bool), config)
        cache = replace(cache, lengths=cache.lengths + seq)
        found += list(np.moveaxis(np.asarray(logits), 1, 0))
    for row, n in enumerate(LENGTHS):
        whole = teacher_forced(name, texts[row, : n + STEPS * seq])
        expected.append(whole[n - 1 : n + STEPS * seq])
    return np.stack(found, 1), np.stack(expected)


@pytest.mark.parametrize(
    ("name", "page_size"), [("v3", PAGE), ("v2", 0), ("mha", 0), ("gqa", PAGE), ("mqa", PAGE)]
)
def test_prefill_and_decode_equal_the_forward(name, page_size):
    found, expected = decoded(name, "fp32", page_size)
    # float32, logits near 3: a few hundred roundings of 6e-8.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_several_tokens_at_once():
    found, expected = decoded("v3", "fp32", PAGE, seq=3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "batch", "seq"), [("v3", 1, 3), ("v3", 3, 2), ("gqa", 3, 1)])
def test_tokens_as_rows_of_one_shape(name, batch, seq):
    """As a GPU has them: zeros after the tokens change nothing, and are written nowhere."""
    config, (texts, prompts) = CONFIGS[name], ragged(name)
    cache = init_cache(config, batch, 40, "fp32")
    cache, _ = prefill(weights(name), cache, prompts[:batch], LENGTHS[:batch], config, chunk=16, drafts=0)
    arguments = weights(name), cache, texts[:batch, :seq], np.ones(batch, bool)
    expected = decode(*arguments, config)
    with target_platform("gpu"):
        rows = linear.rows_of(batch, seq, config, jnp.dtype(jnp.float32))
        found = jax.jit(lambda *given: forward.decode(*given, config))(*arguments)
    assert rows == (batch * seq, batch * (config.mtp.depth + 1), batch <= linear.FEW)
    # float32, values near 1, products of other shapes: a few hundred roundings of 6e-8.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_chunked_prefill():
    found, expected = decoded("v3", "fp32", PAGE, chunk=4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 12])  # Few: a product a choice; many: grouped.
def test_shared_experts_among_the_routed_ones(tokens):
    """As a GPU has them: experts that everybody chooses give what the shared FFN beside the others gives."""
    config = changed(n_layers=1, moe={"n_shared": 2, "n_dense_layers": 0}, mtp={"depth": 0})
    made = make_variables(Transformer(config))
    u = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, config.d_model)), jnp.float32)
    apart, merged = (prepare(made, config, merge_shared=way).layers[0]["moe"] for way in (False, True))
    assert "shared" in apart and "shared" not in merged
    found = [jax.jit(moe, static_argnames="config")(w, u, config=config.moe) for w in (merged, apart)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)  # float32 sums in another order, values near 1.


def test_sequences_at_rest_write_nothing():
    config = CONFIGS["v3"]
    texts, prompts = ragged("v3")
    cache = init_cache(config, 3, 40, "fp32")
    cache, _ = prefill(weights("v3"), cache, prompts, LENGTHS, config, chunk=16, drafts=0)
    before = jax.device_get(cache)
    *_, cache = decode(weights("v3"), cache, texts[:, :1], np.array([True, False, True]), config)
    for old, new in zip(before.layers, cache.layers, strict=True):
        np.testing.assert_array_equal(old.c_kv[1], new.c_kv[1])
        assert (np.asarray(new.c_kv[0]) != old.c_kv[0]).any()


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_a_token_finds_the_same_however_many_come_together_in_bf16(name):
    """To the bit, for sequences of different lengths: else greedy speculation parts at near ties."""
    config, (texts, prompts) = CONFIGS[name], ragged(name)
    width, read = config.mtp.depth + 1, weights(name, jnp.bfloat16)
    start = init_cache(config, 3, 40, "bf16")
    start, _ = prefill(read, start, prompts, LENGTHS, config, chunk=16, drafts=0)
    step = jax.jit(forward.decode, static_argnames="config", compiler_options=programs.AS_WRITTEN)

    def logits(size):
        cache, found = start, []
        for i in range(0, 2 * width, size):
            new = np.take_along_axis(texts, LENGTHS[:, None] + i + np.arange(size), axis=1)
            _, out, cache = step(read, cache, new, np.ones(3, bool), config)
            cache = replace(cache, lengths=cache.lengths + size)
            found.append(np.asarray(out))
        return np.concatenate(found, 1)

    np.testing.assert_array_equal(logits(width), logits(1))

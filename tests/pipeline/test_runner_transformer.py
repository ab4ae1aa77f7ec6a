"""The transformer in a pipeline beside the whole model and the train step's own losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from dsv3_jax.model.transformer import Transformer, forward, init_variables
from dsv3_jax.pipeline import ScheduleError, build, place
from dsv3_jax.pipeline.runner import gradients
from dsv3_jax.pipeline.transformer import merge, parts, split
from dsv3_jax.training.losses import cross_entropy, denominators, losses
from tests.pipeline.test_runner import pipe

ATTENTION = AttentionConfig(
    implementation="reference",
    n_heads=2,
    q_lora_rank=0,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
MOE = MoEConfig(
    implementation="reference", n_dense_layers=1, n_experts=4, top_k=2, d_ff_expert=8, sequence_loss=0.1
)
MODEL = ModelConfig(
    vocab_size=13, d_model=12, n_layers=3, d_ff=16, max_seq_len=8, init_std=0.2, attention=ATTENTION, moe=MOE
)


def make_batch(count, seed=0):
    rng = np.random.default_rng(seed)
    shape = count, 2, 8
    return {
        "tokens": jnp.asarray(rng.integers(0, 13, shape), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, 13, shape), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32) % 5, shape),
        "segment_ids": jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32) // 5, shape),
        "loss_mask": jnp.asarray(rng.random(shape) > 0.2),
    }


def test_gradients_and_counts_of_the_whole_model():
    # Every kind of cell, and stages of two layers and of one, the first dense.
    name, ranks, count = "dualpipe", 2, 4
    model = Transformer(MODEL)
    variables = nn.unbox(jax.jit(lambda key: init_variables(model, key))(jax.random.key(0)))
    # A bias that decides: the pipeline must route with it.
    variables["router"] = jax.tree.map(lambda b: b + jnp.linspace(0, 0.3, 4), variables["router"])
    batch = make_batch(count)
    totals, share = denominators(batch, 0), 1 / count

    def loss_of(params):
        def one(total, micro):
            inputs = (micro["tokens"], micro["positions"], micro["segment_ids"])
            outputs = forward(model, {**variables, "params": params}, *inputs)
            return total + losses(outputs, micro, totals, share, jnp.float32(0), 0).loss, outputs.counts

        total, counts = jax.lax.scan(one, jnp.float32(0), batch)
        return total, counts.sum(0)

    def pipelined(variables, batch):
        table = place(build(name, ranks, count))

        def loss(hidden, head, micro):
            mask = micro["loss_mask"].astype(jnp.float32)
            return cross_entropy(hidden, head, micro["targets"], mask, 0) / totals[0]

        functions = parts(MODEL, ranks, loss, share, mask_documents=True)
        result = gradients(table, pipe(ranks), functions, *split(MODEL, variables, ranks), batch)
        return result.loss, *merge(MODEL, result, ranks)

    loss, grads, counts = jax.jit(pipelined)(variables, batch)
    (want, want_counts), want_grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_array_equal(counts, want_counts)

    # A layer recomputed in another program rounds float32 elsewhere; relative to each array's largest entry.
    def close(path, ours, theirs):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            ours / scale, theirs / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, grads, want_grads)


def test_mtp_is_refused():
    import dataclasses

    config = dataclasses.replace(MODEL, mtp=MTPConfig(depth=1))
    with pytest.raises(ScheduleError, match="model.mtp.depth = 1.*set it to 0"):
        split(config, {"params": {}}, 2)

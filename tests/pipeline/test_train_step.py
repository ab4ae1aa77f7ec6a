"""The training step through a pipeline beside the same step without one: parameters, bias, losses, counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh, use_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import batch_sharding, gradients

SEQ, VOCAB = 8, 13
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=12,
    n_layers=3,
    d_ff=16,
    max_seq_len=SEQ,
    init_std=0.2,
    attention=AttentionConfig(
        implementation="reference",
        n_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    moe=MoEConfig(
        implementation="reference", n_dense_layers=1, n_experts=4, top_k=2, d_ff_expert=8, sequence_loss=0.1
    ),
)


def config(name="", micros=1, mesh=None, mtp=0, layers=3, rows=None, **fields):
    """A run of `micros` micro-batches."""
    mesh = mesh or MeshConfig(data=1)
    rows = rows or 2 * micros
    model = dataclasses.replace(MODEL, mtp=MTPConfig(depth=mtp), n_layers=layers)
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **fields.pop("moe", {})))
    train = dict(seq_len=SEQ, batch_size=rows, micro_batch_size=rows // micros, precision="fp32")
    return Config(
        model=model,
        data=DataConfig(mask_documents=True),
        train=TrainConfig(**train | fields, pipeline=name),
        mesh=mesh,
    )


def make_batch(rows, seed=0):
    """Two documents a sequence, some targets masked."""
    rng = np.random.default_rng(seed)
    shape = rows, SEQ
    return {
        "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
        "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(SEQ, dtype=np.int32) % 5, shape),
        "segment_ids": np.broadcast_to(np.arange(SEQ, dtype=np.int32) // 5, shape),
        "loss_mask": rng.random(shape) > 0.2,
    }


def run(c):
    """(gradients, losses, counts) on the host, from a state that depends on the model alone."""
    mesh = make_mesh(c.mesh)
    abstract = abstract_state(c, mesh)
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        value = ("scale" in jax.tree_util.keystr(path)) + 0.3 * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    state = abstract._replace(
        params=jax.tree_util.tree_map_with_path(draw, abstract.params),
        router=jax.tree_util.tree_map_with_path(draw, abstract.router),  # A bias that decides.
    )
    train = c.train
    shape = -1, train.micro_batch_size, SEQ
    batch = {
        name: jax.device_put(x.reshape(shape), batch_sharding(mesh))
        for name, x in make_batch(train.batch_size).items()
    }

    def step(state, batch):
        with use_mesh(mesh):
            return gradients(c, state, batch, batch["tokens"].shape[0], jnp.float32(0.3))

    return jax.device_get(jax.jit(step)(state, batch))


@functools.cache
def plain(c):
    return run(c)


def compare(c, atol=1e-6):
    """Against one device, no pipeline, the same micro-batches one after the other."""
    train = dataclasses.replace(c.train, pipeline="", remat="none")
    want_grads, want, want_counts = plain(dataclasses.replace(c, train=train, mesh=MeshConfig(data=1)))
    grads, found, counts = run(c)
    # float32 sums over micro-batches, shards and stages, taken in another order.
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_array_equal(counts, want_counts)

    def close(path, ours, theirs):
        scale = np.abs(theirs).max()
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=atol, rtol=0, err_msg=where)

    jax.tree_util.tree_map_with_path(close, grads, want_grads)


CASES = {
    "1f1b": config("1f1b", 2, MeshConfig(pipe=2, data=2, expert=2), mtp=1, rows=8, moe=dict(batch_loss=0.1)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_without_a_pipeline(name):
    compare(CASES[name], 1e-5)

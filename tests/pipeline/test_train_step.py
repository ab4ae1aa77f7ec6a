"""The training step through a pipeline beside the same step without one: parameters, bias, losses, counts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.manager import Checkpoints
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
from dsv3_jax.config_checks import check, check_machine
from dsv3_jax.parallel.mesh import make_mesh, use_mesh
from dsv3_jax.training.state import abstract_state, shardings
from dsv3_jax.training.step import batch_sharding, gradients

SEQ, VOCAB = 8, 13
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=12,
    n_layers=3,
    d_ff=16,
    max_seq_len=SEQ,
    init_std=0.2,
    # Of all kinds of attention the one of fewest operations: compilation is what takes the time here.
    attention=AttentionConfig(kind="mqa", implementation="reference", n_heads=2, head_dim=4),
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


def compare(c, tolerance=1e-6, loss_tolerance=1e-6):
    """Against one device without a pipeline, the same micro-batches one after the other."""
    train = dataclasses.replace(c.train, pipeline="", remat="none")
    want_grads, want, want_counts = plain(dataclasses.replace(c, train=train, mesh=MeshConfig(data=1)))
    grads, found, counts = run(c)
    # float32 sums over micro-batches, shards and stages, taken in another order.
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=loss_tolerance)
    np.testing.assert_array_equal(counts, want_counts)

    def close(path, ours, theirs):
        difference, where = ours.astype(np.float64) - theirs, jax.tree_util.keystr(path)
        assert np.abs(difference).max() <= tolerance * np.abs(theirs).max(), where
        assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(theirs), where

    jax.tree_util.tree_map_with_path(close, grads, want_grads)


# Two MoE layers, then two prediction depths; a dense and a MoE layer, each padded on the other one's rank;
# the balance loss of whole micro-batches. Sums are of float32 terms in another order: entries
# differ by 7e-7 of an array's largest one at most (run once in float64: by 1e-15).
CASES = {
    "1f1b, 2 x 2 x 2, FSDP, prediction": dict(
        name="1f1b", mesh=MeshConfig(pipe=2, data=2, expert=2, sharding="fsdp"), mtp=2, n_dense_layers=0
    ),
    "dualpipe, 2 x 2 x 1, ZeRO-1, remat": dict(
        name="dualpipe", mesh=MeshConfig(pipe=2, data=2, sharding="zero1"), remat="full", n_dense_layers=1
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_without_a_pipeline(case):
    fields = dict(CASES[case])
    moe = dict(batch_loss=0.1, n_shared=0, n_dense_layers=fields.pop("n_dense_layers"))
    compare(config(micros=4, rows=16, layers=2, moe=moe, **fields))


def test_fp8_and_stages_of_one_layer_and_of_two():
    c = config(
        "1f1b",
        2,
        MeshConfig(pipe=2, data=1),
        layers=3,
        precision="fp8",
        moe=dict(n_dense_layers=3),
    )
    # A value at the edge between two E4M3 numbers falls to either side, 2^-4 of itself away, if what was
    # added before it came in another order.
    compare(c, 0.05, loss_tolerance=1e-3)


def test_a_state_is_kept_without_regard_to_the_pipeline(tmp_path):
    """Saved on one mesh and read back on others, for any schedule: the same arrays, names and bytes."""
    halved = config("dualpipe", 4, MeshConfig(pipe=2, data=2, sharding="fsdp"))
    quartered = config("1f1b", 4, MeshConfig(pipe=4, data=1))
    plain, halves, quarters = (abstract_state(c, make_mesh(c.mesh)) for c in (config(), halved, quartered))
    assert halves.params["moe_layers"]["moe"]["gate_up"].sharding.shard_shape((2, 4, 12, 16)) == (2, 2, 6, 16)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), plain)
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), values, halves)
    checkpoints = Checkpoints(tmp_path, halved)
    checkpoints.save(1, {"train": placed}, {}, {})
    checkpoints.close()
    for c, where in ((config(), plain), (quartered, quarters)):
        checkpoints = Checkpoints(tmp_path, c)
        restored = checkpoints.restore_latest({"train": where})
        checkpoints.close()
        assert restored is not None and restored.step == 1
        state = restored.state["train"]
        jax.tree.map(np.testing.assert_array_equal, state, values)
        assert shardings(state) == shardings(where)


REFUSED = {
    "no schedule": (dict(pipe=2), "train.pipeline = '': mesh.pipe = 2 needs a schedule: one of gpipe"),
    "odd ranks": (
        dict(name="dualpipe", micros=6, pipe=3),
        "train.pipeline = 'dualpipe': .*ranks must be even.*Nearest: dualpipe on 4 ranks with 8 micro",
    ),
    "too few micro-batches": (
        dict(name="dualpipev", micros=2, pipe=2, layers=4),
        "two micro-batches a rank. Nearest: dualpipev on 2 ranks with 4",
    ),
    "fewer layers than stages": (
        dict(name="interleaved", micros=4, pipe=2),
        "mesh.pipe = 2: interleaved: too few layers: 3 layers in 4 stages.*Nearest: 3 stages, or 4 layers",
    ),
    "a ramp": (
        dict(name="1f1b", micros=2, pipe=2, ramp_start_batch=2, ramp_until=0.5),
        "train.ramp_start_batch = 2: a schedule has a fixed number of micro-batches",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_compiled(case):
    fields, message = REFUSED[case]
    fields = dict(fields)
    found = check_machine(config(mesh=MeshConfig(pipe=fields.pop("pipe"), data=1), **fields), 8, None)
    assert len(found) == 1 and re.search(message, str(found[0])), found


def test_an_unknown_schedule_is_refused():
    (problem,) = check(config("1f2b", 2))
    assert "train.pipeline = '1f2b': choose one of" in str(problem) and "1f1b" in problem.fix

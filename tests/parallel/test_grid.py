"""A training step on meshes of 8 devices, by ZeRO mode and accumulation, against one device, in float32.

Two programs of the 24; with the three of `training/test_step.py`, which compares with float64 numpy, they
have every mesh, every mode, and each with and without accumulation. Precisions are compared where they act,
in `test_exchange.py`: XLA:CPU sums small bf16 products in bf16, which hides errors of a whole step.
"""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step

SEQ, BATCH = 4, 16
MODEL = ModelConfig(
    vocab_size=16,
    d_model=16,
    n_layers=1,
    init_std=0.3,
    attention=AttentionConfig(kind="mqa", n_heads=2, head_dim=4),
    moe=MoEConfig(n_dense_layers=0, n_experts=16, top_k=3, d_ff_expert=8, n_groups=4, topk_groups=2),
)
# Mesh (data, expert), sharding, micro-batches, where the moments are.
CASES = [
    ((4, 2), "fsdp", 1, "host"),
    ((1, 8), "zero1", 2, "device"),
]
RATES = Schedules(*np.float32((0.02, 0.25, 0.3)))


def config(mesh=(1, 1), sharding="replicated", micro=1, memory="device"):
    sizes = dict(seq_len=SEQ, batch_size=BATCH, micro_batch_size=BATCH // micro)
    return Config(
        model=MODEL,
        # An eps near the gradients' size, so that a rounding does not become a whole step.
        optimizer=OptimizerConfig(eps=0.01, clip_norm=0.5, memory=memory),
        train=TrainConfig(precision="fp32", remat="v3", **sizes),
        mesh=MeshConfig(data=mesh[0], expert=mesh[1], sharding=sharding),
    )


@functools.cache
def step(*case):
    """(state, batch) -> the state after a step and its metrics, on the host."""
    c = config(*case)
    mesh = make_mesh(c.mesh)
    abstract, run = abstract_state(c, mesh), make_train_step(c, mesh)
    rng = np.random.default_rng(1)
    text = rng.integers(0, MODEL.vocab_size, (BATCH, SEQ + 1)).astype(np.int32)
    rows = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "positions": np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1)),
        "segment_ids": np.ones((BATCH, SEQ), np.int32),
        "loss_mask": np.ones((BATCH, SEQ), bool),
    }
    shape = (-1, c.train.micro_batch_size, SEQ)
    batch = {k: jax.device_put(x.reshape(shape), batch_sharding(mesh)) for k, x in rows.items()}

    def value(path, leaf):
        where = jax.tree_util.keystr(path)
        drawn = 0.3 * rng.standard_normal(leaf.shape) + ("scale" in where)
        return np.zeros(leaf.shape, leaf.dtype) if "optimizer" in where else drawn.astype(leaf.dtype)

    start = jax.tree_util.tree_map_with_path(value, abstract)
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), start, abstract)
    return start, *jax.device_get(run(placed, batch, np.int32(len(batch["tokens"])), RATES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_one_device(case):
    start, state, metrics = step(*case)
    _, one, expected = step()
    # Sums over devices in another order, of some hundred float32 terms.
    assert abs(metrics.losses.loss / expected.losses.loss - 1) < 1e-6
    assert abs(metrics.grad_norm / expected.grad_norm - 1) < 1e-6
    np.testing.assert_array_equal(metrics.counts, expected.counts)
    assert metrics.counts.sum() == BATCH * SEQ * MODEL.moe.top_k
    for a, b in zip(jax.tree.leaves(state.router), jax.tree.leaves(one.router), strict=True):
        np.testing.assert_array_equal(a, b)
    # The first moment is the clipped gradient times 1 - b1, so this compares gradients; then the parameters.
    moved = jax.tree.map(lambda a, b: a - b, state.params, start.params)
    wanted = jax.tree.map(lambda a, b: a - b, one.params, start.params)
    for ours, theirs in ((state.optimizer.mu, one.optimizer.mu), (moved, wanted)):
        pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
        for (path, a), b in pairs:
            off, size = np.linalg.norm(a - b), np.linalg.norm(b)
            # Gradients that cancel, and parameters of 1 that move by 0.01: some roundings more.
            assert size > 0 and off < 3e-6 * size, (jax.tree_util.keystr(path), off / size)

"""A checkpoint of one mesh restored on others: 8 devices, 4, 1 and 8 again, bit by bit."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import CheckpointError, Checkpoints
from dsv3_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state

CONFIG = Config(
    model=ModelConfig(
        vocab_size=16,
        d_model=8,
        n_layers=1,
        attention=AttentionConfig(kind="mqa", n_heads=1, head_dim=4),
        moe=MoEConfig(n_dense_layers=0, n_experts=8, d_ff_expert=4),
    )
)
MESHES = [
    dict(data=2, expert=4, sharding="fsdp"),
    dict(data=2, expert=2, sharding="zero1"),
    dict(data=1, expert=1),
    dict(data=1, expert=8, sharding="fsdp"),
]


def on(memory="device", **mesh):
    optimizer = OptimizerConfig(moment_dtype="bfloat16", memory=memory)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**mesh), optimizer=optimizer)
    return config, abstract_state(config, make_mesh(config.mesh))


def test_restores_on_any_number_of_devices(tmp_path):
    rng = np.random.default_rng(0)
    config, abstract = on(**MESHES[0])
    values = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), values, abstract)
    for step, mesh in enumerate(MESHES[1:], 1):
        with_checkpoints(tmp_path, config, lambda c, s=state, n=step: c.save(n, {"train": s}, {}))
        # On 4 devices the moments move to host memory, and back.
        config, abstract = on(memory="host" if step == 1 else "device", **mesh)
        restored = with_checkpoints(tmp_path, config, lambda c, a=abstract: c.restore_latest({"train": a}))
        assert restored.step == step
        state = restored.state["train"]
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {(0, 4, 1, 8)[step]}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), values)
    # Of other experts it cannot be, whatever the mesh.
    other = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, n_experts=16))
    config = dataclasses.replace(config, model=other)
    abstract = abstract_state(config, make_mesh(config.mesh))
    with pytest.raises(CheckpointError, match="model.moe.n_experts is 8 in the checkpoint and 16 here"):
        with_checkpoints(tmp_path, config, lambda c: c.restore_latest({"train": abstract}))


def with_checkpoints(path, config, work):
    checkpoints = Checkpoints(path, config)
    try:
        return work(checkpoints)
    finally:
        checkpoints.close()

"""The first state: its values, and its layout under every sharding mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state, init_state, make_model, parameter_count

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        d_ff=48,
        init_std=0.05,
        moe=MoEConfig(n_experts=8, d_ff_expert=16),
        mtp=MTPConfig(depth=1),
    ),
    optimizer=OptimizerConfig(moment_dtype="bfloat16"),
    train=TrainConfig(seed=3),
)


def on(data, expert, sharding):
    return dataclasses.replace(CONFIG, mesh=MeshConfig(data=data, expert=expert, sharding=sharding))


@functools.cache
def state_on(config):
    return init_state(config, make_mesh(config.mesh))


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_first_values():
    state = state_on(on(1, 1, "replicated"))
    spread = []
    for path, leaf in named(state.params).items():
        assert leaf.dtype == jnp.float32
        if path.endswith("['scale']"):
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
        else:
            spread.append(np.asarray(leaf).ravel() / 0.05)
            # The deviation of n normal draws is off by 1/sqrt(2n): five of those.
            assert np.std(spread[-1]) == pytest.approx(1, abs=5 / np.sqrt(2 * leaf.size)), path
    assert np.mean(np.concatenate(spread)) == pytest.approx(0, abs=5 / np.sqrt(sum(s.size for s in spread)))
    layers = np.asarray(state.params["moe_layers"]["moe"]["gate_up"])
    assert len(np.unique(layers)) > 0.99 * layers.size  # No layer or expert is a copy of another.
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in jax.tree.leaves(state.router))
    moments = jax.tree.leaves((state.optimizer.mu, state.optimizer.nu))
    assert all(leaf.dtype == jnp.bfloat16 and not leaf.any() for leaf in moments)
    assert state.optimizer.count == 0
    assert parameter_count(state.params) == sum(np.size(x) for x in jax.tree.leaves(state.params))
    assert "router" not in str(jax.tree.structure((state.params, state.optimizer)))  # No optimizer state.


def test_the_same_values_on_every_mesh():
    one, many = state_on(on(1, 1, "replicated")), state_on(on(2, 4, "fsdp"))
    for (path, a), b in zip(named(one).items(), named(many).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert jax.tree.map(lambda x: x.sharding, many) == jax.tree.map(
        lambda x: x.sharding, abstract_state(on(2, 4, "fsdp"), make_mesh(MeshConfig(data=2, expert=4)))
    )


@pytest.mark.parametrize("sharding", ["replicated", "zero1", "fsdp"])
def test_layout(sharding):
    """What one of 2 x 4 devices holds: a quarter of the experts, and by the mode an eighth of everything."""
    config = on(2, 4, sharding)
    state = abstract_state(config, make_mesh(config.mesh))

    def held(tree):
        return {path: np.prod(x.sharding.shard_shape(x.shape)) / x.size for path, x in named(tree).items()}

    # By mode, whether the replicas split (experts' parameters, other parameters, moments).
    split = {"replicated": (False,) * 3, "zero1": (True, False, True), "fsdp": (True,) * 3}[sharding]
    for tree, of_experts, of_others in ((state.params, *split[:2]), (state.optimizer.mu, split[2], split[2])):
        for path, part in held(tree).items():
            experts = "['moe']['gate_up']" in path or "['moe']['down']" in path
            whole = 1 / 4 if experts else 1
            assert part == (1 / 8 if (of_experts if experts else of_others) else whole), path
    assert held(state.optimizer.nu) == held(state.optimizer.mu)
    assert set(held(state.router).values()) == {1}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", jnp.bfloat16), ("fp32", jnp.float32)])
def test_precision_by_name(name, dtype):
    config = dataclasses.replace(CONFIG, train=TrainConfig(precision=name, remat="v3"))
    assert make_model(config).dtype == dtype and make_model(config).remat == "v3"

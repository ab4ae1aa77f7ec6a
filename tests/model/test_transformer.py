"""The whole model, forward and backward, against float64 numpy written from the equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.model.transformer import merge_router_counts
from dsv3_jax.training.losses import denominators, losses
from tests.model.translate import to_oracle
from tests.model.whole import make_batch, oracle_losses
from tests.oracles.gradient import directional_derivative
from tests.oracles.tree import tree_map

SMALL = ModelConfig(
    vocab_size=29,
    d_model=16,
    n_layers=3,
    d_ff=24,
    init_std=0.3,
    attention=AttentionConfig(
        n_heads=2,
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_kv_heads=1,
        head_dim=8,
    ),
    moe=MoEConfig(n_experts=8, top_k=3, d_ff_expert=7, n_groups=4, topk_groups=2, sequence_loss=0.5),
    mtp=MTPConfig(depth=2),
)


def changed(attention=None, moe=None, mtp=None, rope=None, **model):
    sections = {"attention": attention, "moe": moe, "mtp": mtp, "rope": rope}
    replaced = {
        name: dataclasses.replace(getattr(SMALL, name), **values)
        for name, values in sections.items()
        if values
    }
    return dataclasses.replace(SMALL, **replaced, **model)


YARN = {"yarn_factor": 4.0, "yarn_original_len": 8, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.25}
CONFIGS = {
    "v3": changed(rope=YARN | {"yarn_mscale": 0.7}),
    "v2": changed(
        attention={"q_lora_rank": 0},
        moe={
            "gate": "softmax",
            "group_score": "max",
            "normalize_gates": False,
            "n_shared": 2,
            "routed_scale": 4.0,
            "n_dense_layers": 0,
            "sequence_loss": 0.0,
            "batch_loss": 0.3,
            "expert_loss": 0.2,
            "device_loss": 0.4,
            "communication_loss": 0.1,
        },
        mtp={"depth": 0},
    ),
    "gqa_dense": changed(
        attention={"kind": "gqa", "n_heads": 4, "n_kv_heads": 2},
        moe={"n_dense_layers": 3},
        mtp={"depth": 1},
        rope={"interleaved": False},
        tie_embeddings=True,
    ),
    "mqa_parallel": changed(
        attention={"kind": "mqa"},
        mtp={"kind": "parallel", "depth": 1},
        moe={"n_shared": 0, "n_dense_layers": 1},
    ),
}


def make_variables(model):
    rng = np.random.default_rng(7)
    shapes = meta.unbox(jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0)))

    # Norms away from 1 and a router bias that changes the selection, so that both are seen.
    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + model.config.init_std * rng.standard_normal(leaf.shape), jnp.float32)

    return {"router": {}} | jax.tree_util.tree_map_with_path(draw, shapes)


def our_losses(model, variables, batch, mtp_weight=0.3):
    outputs = model.apply(
        variables, batch["tokens"], batch["positions"], batch["segment_ids"], batch["targets"]
    )
    totals = denominators(batch, model.config.mtp.depth)
    return losses(outputs, batch, totals, 1.0, jnp.float32(mtp_weight), 0), outputs


@functools.cache  # Packed and unpacked batches share a compilation.
def loss_and_gradients(name):
    model = Transformer(CONFIGS[name])

    def loss(params, router, batch):
        parts, outputs = our_losses(model, {"params": params, "router": router}, batch)
        return parts.loss, (parts, outputs.counts)

    return model, jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_counts_and_gradients(name, packed):
    config = CONFIGS[name]
    model, ours = loss_and_gradients(name)
    batch = make_batch(config, packed)
    variables = make_variables(model)
    (_, (parts, counts)), grads = ours(variables["params"], variables["router"], batch)
    tree = to_oracle(variables["params"], variables["router"], config)
    loss, ce, by_depth, balance_loss, oracle_counts = oracle_losses(tree, batch, config)

    # float32 against float64: a few hundred roundings of 6e-8 on values near 3.
    np.testing.assert_allclose(parts.ce_loss, ce, rtol=1e-5)
    np.testing.assert_allclose(parts.mtp_loss, by_depth, rtol=1e-5)
    np.testing.assert_allclose(parts.balance_loss, balance_loss, rtol=1e-5)
    np.testing.assert_allclose(parts.loss, loss, rtol=1e-5)
    np.testing.assert_array_equal(counts, np.array(oracle_counts).reshape(counts.shape))

    # The gradient along two random directions; the oracle differentiates by central differences.
    rng = np.random.default_rng(3)
    gradient = to_oracle(grads, None, config)
    plain = to_oracle(variables["params"], None, config)
    biased = to_oracle(variables["params"], variables["router"], config)

    def with_bias(t):
        for ours_, theirs in zip(_moe_parts(t), _moe_parts(biased), strict=True):
            ours_["bias"] = theirs["bias"]
        return t

    for _ in range(2):
        along = tree_map(lambda x: rng.standard_normal(x.shape) / 10, plain)
        slope = directional_derivative(
            lambda t: oracle_losses(with_bias(tree_map(np.copy, t)), batch, config)[0], plain, along, 1e-5
        )
        expected = sum(np.vdot(g, a) for g, a in zip(_leaves(gradient), _leaves(along), strict=True))
        size = sum(np.abs(g * a).sum() for g, a in zip(_leaves(gradient), _leaves(along), strict=True))
        # Relative to the sum of magnitudes, since the terms cancel: float32 rounding of each term.
        assert abs(slope - expected) < 1e-5 * size


def _moe_parts(tree):
    layers = tree["layers"] + [depth["block"] for depth in tree["mtp"]]
    return [layer["ffn"] for layer in layers if "w_router" in layer["ffn"]]


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in _leaves(tree[name])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [np.asarray(tree, np.float64)]


def test_counts_find_their_way_to_the_bias_of_their_layer():
    model = Transformer(CONFIGS["v3"])
    router = make_variables(model)["router"]
    counts = jnp.arange(4 * 8).reshape(4, 8)  # Two MoE layers and two prediction depths.
    merged = merge_router_counts(router, counts)
    np.testing.assert_array_equal(merged["moe_layers"]["moe"]["bias"], counts[:2])
    np.testing.assert_array_equal(merged["mtp_1"]["block"]["moe"]["bias"], counts[2])
    np.testing.assert_array_equal(merged["mtp_2"]["block"]["moe"]["bias"], counts[3])


def test_gradient_of_a_frequent_token_is_summed_in_float32():
    """In bf16, 2048 equal terms would stop growing at the 256th."""
    config = changed(attention={"kind": "mqa"}, moe={"n_dense_layers": 1}, mtp={"depth": 0}, n_layers=1)
    tokens = jnp.full((4, 512), 3)
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Transformer(config, dtype)
        params = make_variables(model)["params"]

        def value(params, model=model):
            hidden = model.apply({"params": params}, tokens).hidden
            return (hidden.astype(jnp.float32) * jnp.arange(1.0, 17.0)).sum()

        found[dtype] = np.asarray(jax.jit(jax.grad(value))(params)["embedding"][3])
    expected = found[jnp.float32]
    # bf16 keeps 8 bits: each of the terms, equal ones, is off by a few 2^-8 of the largest.
    np.testing.assert_allclose(found[jnp.bfloat16], expected, atol=0.05 * np.abs(expected).max())

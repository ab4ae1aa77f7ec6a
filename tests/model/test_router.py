"""Routing and its balance losses against float64 numpy written from the equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MoEConfig
from dsv3_jax.model.balance import balance_loss
from dsv3_jax.model.router import load, mask_groups, max_violation, route, updated_bias
from tests.oracles import balance, moe
from tests.oracles.gradient import directional_derivative

V3 = MoEConfig(n_experts=12, top_k=4, n_groups=4, topk_groups=2, routed_scale=2.5, sequence_loss=0.0)
V2 = dataclasses.replace(V3, gate="softmax", group_score="max", normalize_gates=False, routed_scale=16.0)
ROUTERS = {
    "V3": V3,
    "V2": V2,
    "no groups": dataclasses.replace(V3, n_groups=1, topk_groups=1),
    "all groups": dataclasses.replace(V3, topk_groups=4),
    "one expert a token": dataclasses.replace(V3, top_k=1, group_score="max"),
}
BIASES = {"none": 0.0, "of either sign": None, "all biased scores negative": -3.0}
LOSSES = ("sequence_loss", "batch_loss", "expert_loss", "device_loss", "communication_loss")


def inputs(bias, experts=12):
    rng = np.random.default_rng(5)
    u = rng.normal(size=(2, 9, 8)).astype(np.float32)
    centroids = 0.4 * rng.normal(size=(8, experts)).astype(np.float32)
    wide = 0.5 * rng.normal(size=experts).astype(np.float32)
    return u, centroids, wide if bias is None else np.full(experts, bias, np.float32)


def oracle_route(u, centroids, bias, c):
    options = dict(top_k=c.top_k, n_groups=c.n_groups, topk_groups=c.topk_groups, scale=c.routed_scale)
    options |= dict(group_score=c.group_score, gate=c.gate, normalize=c.normalize_gates)
    return [moe.route(row, centroids, bias, **options) for row in u]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ROUTERS)
def test_selection_gates_and_counts(name, bias):
    config, (u, centroids, b) = ROUTERS[name], inputs(BIASES[bias])
    ours = jax.jit(route, static_argnums=3)(u, centroids, b, config)
    theirs = oracle_route(u, centroids, b, config)
    np.testing.assert_array_equal(ours.indices, [r.selected for r in theirs])
    # float32 sums of 8 products, then a sigmoid or exponential: a few roundings of 6e-8.
    np.testing.assert_allclose(ours.scores, [r.scores for r in theirs], rtol=1e-5)
    np.testing.assert_allclose(ours.gates, [r.gates for r in theirs], rtol=1e-5)
    counts = load(ours.indices, 12)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, sum(r.counts for r in theirs))
    groups = np.asarray(ours.indices) // 3
    if config.n_groups == 4:
        assert max(len(set(token)) for row in groups for token in row) <= config.topk_groups


def test_masked_groups_lose_to_negative_scores():
    """-inf and not 0: a mask of 0 would beat the negative scores of the groups that were selected."""
    config = MoEConfig(n_experts=4, top_k=2, n_groups=2, topk_groups=1)
    by_maximum = dataclasses.replace(config, group_score="max")
    out = -np.inf
    biased = jnp.array([-0.5, -1.0, -1.5, -2.0])
    np.testing.assert_array_equal(mask_groups(biased, config), [-0.5, -1.0, out, out])
    uneven = jnp.array([-0.5, -9.0, -1.5, -2.0])  # Group 1 has the better sum, group 0 the better maximum.
    np.testing.assert_array_equal(mask_groups(uneven, config), [out, out, -1.5, -2.0])
    np.testing.assert_array_equal(mask_groups(uneven, by_maximum), [-0.5, -9.0, out, out])


@pytest.mark.parametrize("name", ["V3", "V2"])
def test_gradients(name):
    """The gates' gradient reaches input and centroids, and the bias gets none at all."""
    config, (u, centroids, b) = ROUTERS[name], inputs(None)
    weights = np.random.default_rng(6).normal(size=(2, 9, 4))

    def ours(u, centroids, bias):
        routing = route(u, centroids, bias, with_losses)
        return jnp.vdot(routing.gates, weights.astype(np.float32)) + balance_loss(routing, with_losses)

    with_losses = dataclasses.replace(config, **dict.fromkeys(LOSSES, 0.3))
    du, dcentroids, dbias = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(u, centroids, b)
    np.testing.assert_array_equal(dbias, np.zeros(12))

    def theirs(t):
        rows = oracle_route(t["u"], t["centroids"], b, config)
        gates, scores = np.stack([r.gates for r in rows]), np.stack([r.scores for r in rows])
        return float(np.vdot(gates, weights)) + 0.3 * sum(all_losses(scores, rows, config))

    rng = np.random.default_rng(7)
    at = {"u": u, "centroids": centroids}
    for _ in range(3):
        along = {k: rng.normal(size=x.shape) for k, x in at.items()}
        slope = directional_derivative(theirs, at, along, 1e-6)
        pairs = [(np.asarray(du), along["u"]), (np.asarray(dcentroids), along["centroids"])]
        # float32 rounding of each term of the inner product.
        expected, size = (sum(np.vdot(g, a) for g, a in pairs), sum(np.abs(g * a).sum() for g, a in pairs))
        assert abs(slope - expected) < 1e-5 * size


def all_losses(scores, rows, c):
    selected = np.stack([r.selected for r in rows])
    return (
        balance.sequence_loss(scores, c.top_k),
        balance.batch_loss(scores, c.top_k),
        balance.expert_loss(scores, selected),
        balance.device_loss(scores, selected, c.n_groups),
        balance.communication_loss(scores, selected, c.n_groups, c.topk_groups),
    )


@pytest.mark.parametrize("name", ["V3", "V2"])
def test_each_balance_loss(name):
    config, (u, centroids, b) = ROUTERS[name], inputs(None)
    rows = oracle_route(u, centroids, b, config)
    expected = all_losses(np.stack([r.scores for r in rows]), rows, config)
    routing = jax.jit(route, static_argnums=3)(u, centroids, b, config)
    ours = jax.jit(balance_loss, static_argnums=1)
    for field, value in zip(LOSSES, expected, strict=True):
        alone = dataclasses.replace(config, **{field: 0.7})
        # float32 means of 18 tokens.
        np.testing.assert_allclose(ours(routing, alone), 0.7 * value, rtol=1e-5)
    assert len({round(value, 6) for value in expected}) == 5  # Mistaking one for another would be seen.
    assert balance_loss(routing, config) == 0.0


def test_bias_update_and_violation():
    counts = jnp.array([[4, 0, 2, 2], [1, 1, 3, 3]])
    bias = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, -0.5, 0.0, 0.5]])
    expected = [balance.bias_after_steps(b, c[None], [0.25]) for b, c in zip(bias, counts, strict=True)]
    np.testing.assert_array_equal(updated_bias(bias, counts, 0.25), expected)  # Exact: powers of two.
    np.testing.assert_array_equal(updated_bias(bias, counts, 0.0), bias)
    np.testing.assert_array_equal(max_violation(counts), [balance.max_violation(c) for c in counts])
    # A mean that is no whole number, at the size of a real step: 15.7M tokens, 8 of 256 experts.
    large = np.random.default_rng(0).integers(450_000, 530_000, 256).astype(np.int32)
    large[0] = round(large.mean())
    one = balance.bias_after_steps(np.zeros(256), large[None], [1.0])
    ours = np.asarray(updated_bias(jnp.zeros(256), jnp.asarray(large), 1.0))
    np.testing.assert_array_equal(ours[1:], one[1:])

"""The training step on 1 and 8 devices, in whole and in micro-batches, against float64 numpy oracles."""

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
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step
from tests.model.translate import to_oracle
from tests.model.whole import SEQ, make_batch, oracle_losses
from tests.oracles.balance import bias_after_steps, max_violation

MODEL = ModelConfig(
    vocab_size=31,
    d_model=16,
    n_layers=1,
    init_std=0.3,
    attention=AttentionConfig(
        n_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
    ),
    moe=MoEConfig(
        n_dense_layers=0, n_experts=8, top_k=2, d_ff_expert=8, n_groups=4, topk_groups=2, sequence_loss=0.01
    ),
    mtp=MTPConfig(depth=1),
)
BATCH = 16
# An eps near the size of the gradients: at 1e-8 the first steps are the gradient's sign, and a gradient
# of 1e-9 that rounds to the other side of zero moves its parameter by the whole learning rate.
OPTIMIZER = OptimizerConfig(eps=0.01, weight_decay=0.5, clip_norm=0.5)


def config(micro=BATCH, remat="none", mesh=None, **train):
    fields = dict(seq_len=SEQ, batch_size=BATCH, micro_batch_size=micro, precision="fp32", remat=remat)
    return Config(
        model=MODEL,
        data=DataConfig(mask_documents=True),
        optimizer=OPTIMIZER,
        train=TrainConfig(**fields | train),
        mesh=mesh or MeshConfig(data=1, expert=1),
    )


RAMP = dict(ramp_start_batch=4, ramp_until=0.5)
VARIANTS = {
    "whole": config(),
    "4 micro-batches, remat v3, count at run time": config(micro=4, remat="v3", **RAMP),
    "8 x 1, replicated, 2 micro-batches, remat full": config(
        micro=8, remat="full", mesh=MeshConfig(data=8, expert=1)
    ),
    "4 x 2, ZeRO-1, remat dots": config(remat="dots", mesh=MeshConfig(data=4, expert=2, sharding="zero1")),
    "2 x 4, FSDP, 2 micro-batches": config(micro=8, mesh=MeshConfig(data=2, expert=4, sharding="fsdp")),
}
WHOLE = "whole"
# Learning rate, bias speed and MTP weight of each step; the last step's bias speed is 0.
RATES = (Schedules(0.02, 0.25, 0.3), Schedules(0.01, 0.125, 0.1), Schedules(0.02, 0.0, 0.1))


@functools.cache
def compiled(name):
    mesh = make_mesh(VARIANTS[name].mesh)
    return make_train_step(VARIANTS[name], mesh), abstract_state(VARIANTS[name], mesh)


def first_state(name):
    """The same random state for every variant, laid out as its mesh asks; the bias is not zero."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        where = jax.tree_util.keystr(path)
        if "optimizer" in where:
            value = np.zeros(leaf.shape)
        else:
            value = ("scale" in where) + 0.3 * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, compiled(name)[1])


def put(name, rows):
    c = VARIANTS[name]
    shape = (-1, c.train.micro_batch_size, SEQ)
    sharding = batch_sharding(make_mesh(c.mesh))
    return {k: jax.device_put(x.reshape(shape), sharding) for k, x in rows.items()}


def step(name, state, rows, rates, n_micro=None):
    batch = put(name, rows)
    n_micro = n_micro or len(batch["tokens"])
    return compiled(name)[0](state, batch, np.int32(n_micro), Schedules(*map(np.float32, rates)))


def rows_of(number):
    return make_batch(MODEL, True, BATCH, seed=100 + number)


@functools.cache
def run(name):
    """The states before and after each step, and their metrics, on the host."""
    state, states, metrics = first_state(name), [], []
    states.append(jax.device_get(state))
    for number, rates in enumerate(RATES):
        state, found = step(name, state, rows_of(number), rates)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def biases(router):
    """[rows, experts], in the order of the counts."""
    return np.concatenate(
        [router["moe_layers"]["moe"]["bias"], router["mtp_1"]["block"]["moe"]["bias"][None]]
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


@functools.cache
def oracle():
    """By step: losses and counts of the global batch, by the oracle, at the parameters of that step."""
    states, _ = run(WHOLE)
    found = []
    for number, state in enumerate(states[:-1]):
        tree = to_oracle(state.params, state.router, MODEL)
        found.append(oracle_losses(tree, rows_of(number), MODEL))
    return found


def test_losses_and_counts_equal_the_oracle_on_the_global_batch():
    _, metrics = run(WHOLE)
    for (_, ce, by_depth, balance_loss, counts), rates, found in zip(oracle(), RATES, metrics, strict=True):
        # float32 sums over 112 tokens of 31 classes.
        np.testing.assert_allclose(found.losses.ce_loss, ce, rtol=1e-5)
        np.testing.assert_allclose(found.losses.mtp_loss, by_depth, rtol=1e-5)
        np.testing.assert_allclose(found.losses.balance_loss, balance_loss, rtol=1e-5)
        total = ce + balance_loss + rates.mtp_weight * by_depth[0]
        np.testing.assert_allclose(found.losses.loss, total, rtol=1e-5)
        np.testing.assert_array_equal(found.counts, counts)
        np.testing.assert_allclose(found.max_vio, [max_violation(row) for row in counts], rtol=1e-6)
        assert found.finite
        # Two experts for each of 112 tokens; at depth 1 the last of each sequence has no target.
        assert found.counts.sum(axis=1).tolist() == [2 * BATCH * SEQ, 2 * BATCH * (SEQ - 1)]


@pytest.mark.parametrize("name", VARIANTS)
def test_router_bias_equals_the_oracle_over_global_counts(name):
    """Signs are taken once a step, from the counts of all shards and micro-batches."""
    states, metrics = run(name)
    counts = [np.array(step_counts) for *_, step_counts in oracle()]
    for number, expected in enumerate(counts):
        np.testing.assert_array_equal(metrics[number].counts, expected)
    start, speeds = biases(states[0].router), [rates.bias_speed for rates in RATES]
    for row in range(2):
        expected = bias_after_steps(start[row], np.array([c[row] for c in counts]), speeds)
        # Two float32 additions. No gradient, decay or clipping: all three are on in this run.
        np.testing.assert_allclose(biases(states[-1].router)[row], expected, atol=1e-7, rtol=0)
    assert bits(states[2].router) == bits(states[3].router)  # At speed 0 not a bit moves.


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != WHOLE])
def test_parameters_equal_one_device_and_one_batch(name):
    (ours, metrics), (whole, whole_metrics) = run(name), run(WHOLE)
    for a, b in zip(metrics, whole_metrics, strict=True):
        assert a.grad_norm > 2 * OPTIMIZER.clip_norm  # Clipping is at work.
        # The order of float32 sums differs: a few roundings of 6e-8.
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(a.losses.loss, b.losses.loss, rtol=1e-5)
    paths = jax.tree_util.tree_leaves_with_path(ours[-1].params)
    others, starts = jax.tree.leaves(whole[-1].params), jax.tree.leaves(whole[0].params)
    for (path, a), b, start in zip(paths, others, starts, strict=True):
        moved = np.abs(b - start).max()
        assert moved > 1e-3, path
        # Differences of gradients of 1e-6 of their size, divided by a root of squares near eps.
        np.testing.assert_allclose(a, b, atol=1e-4 * moved, err_msg=jax.tree_util.keystr(path))
    assert bits(ours[-1].router) == bits(whole[-1].router)


def test_ramp_ignores_micro_batches_past_the_count():
    """Two of four micro-batches equal a whole batch that holds them twice, whatever the others hold."""
    ramp, half = "4 micro-batches, remat v3, count at run time", BATCH // 2
    rows, other = rows_of(0), rows_of(1)
    padded = {k: np.concatenate([rows[k][:half], other[k][half:]]) for k in rows}
    twice = {k: np.concatenate([rows[k][:half], rows[k][:half]]) for k in rows}
    a, ours = step(ramp, first_state(ramp), padded, RATES[0], n_micro=2)
    b, theirs = step(WHOLE, first_state(WHOLE), twice, RATES[0])
    np.testing.assert_array_equal(2 * ours.counts, theirs.counts)
    np.testing.assert_allclose(ours.losses.loss, theirs.losses.loss, rtol=1e-5)
    np.testing.assert_allclose(ours.losses.mtp_loss, theirs.losses.mtp_loss, rtol=1e-5)
    np.testing.assert_allclose(ours.losses.balance_loss, theirs.losses.balance_loss, rtol=1e-5)
    assert bits(a.router) == bits(b.router)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)  # Of moves of 1e-2; rounding as above.


def with_nan(state):
    head = state.params["head"].at[0, 0].set(jnp.nan)
    return state._replace(params=state.params | {"head": head})


BAD = {
    "infinite loss": (lambda state: state, Schedules(0.02, 0.25, np.inf)),
    "gradients that overflow, finite loss": (lambda state: state, Schedules(0.02, 0.25, 1e25)),
    "a parameter that is not a number": (with_nan, RATES[0]),
}


@pytest.mark.parametrize("name", [WHOLE, "2 x 4, FSDP, 2 micro-batches"])
@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_not_finite_changes_nothing(kind, name):
    spoil, rates = BAD[kind]
    state, _ = step(name, first_state(name), rows_of(0), RATES[0])  # Moments that are not zero.
    state = spoil(state)
    before = bits(state)
    state, metrics = step(name, state, rows_of(1), rates)
    assert not metrics.finite
    assert np.isfinite(metrics.losses.loss) == (kind == "gradients that overflow, finite loss")
    assert bits(state) == before  # Parameters, moments, count and router.


def test_after_a_bad_step_training_goes_on_as_without_it():
    state, _ = step(WHOLE, first_state(WHOLE), rows_of(0), RATES[0])
    state, _ = step(WHOLE, state, rows_of(5), BAD["infinite loss"][1])
    state, _ = step(WHOLE, state, rows_of(1), RATES[1])
    assert bits(state) == bits(run(WHOLE)[0][2])


@pytest.mark.parametrize("name", [WHOLE, "8 x 1, replicated, 2 micro-batches, remat full"])
def test_runs_repeat_bitwise(name):
    states, metrics = run(name)
    state = first_state(name)
    for number, rates in enumerate(RATES):
        state, found = step(name, state, rows_of(number), rates)
        assert bits(found) == bits(metrics[number])
    assert bits(state) == bits(states[-1])


def skewed_state():
    """Experts 0 and 1 of each layer win every token: all inputs share a direction, theirs."""
    state = first_state(WHOLE)
    shared = np.full(16, 0.5, np.float32)

    def skew(path, leaf):
        where = jax.tree_util.keystr(path)
        if "embedding" in where and "norm" not in where:
            return leaf + shared
        if "centroids" in where:
            return leaf.at[..., :2].add(0.5 * shared[:, None])
        return leaf

    params = jax.tree_util.tree_map_with_path(skew, state.params)
    return state._replace(params=params, router=jax.tree.map(jnp.zeros_like, state.router))


def last_violation(bias_speed, steps=300, last=60):
    state, total = skewed_state(), 0
    first = None
    for number in range(steps):
        rates = Schedules(1e-4, bias_speed if number < steps - 2 * last else bias_speed / 10, 0.3)
        state, metrics = step(WHOLE, state, make_batch(MODEL, False, BATCH, seed=number), rates)
        first = np.asarray(metrics.max_vio) if first is None else first
        if number >= steps - last:
            total = total + np.asarray(metrics.counts)
    return first, np.array([max_violation(row) for row in total])


def test_the_bias_balances_a_skewed_router():
    """Global MaxVio (arXiv 2408.15664) over the last 60 steps; each batch is new text."""
    first, balanced = last_violation(0.02)
    assert first.min() > 1.0
    assert balanced.max() < 0.1
    _, unbalanced = last_violation(0.0)
    assert unbalanced.min() > 1.0

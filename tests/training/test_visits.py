"""State in host memory that visits the device, against numpy and against the same state on the device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.training import ema, optimizer, visits

DEVICE = SingleDeviceSharding(jax.devices()[0])
HOST = DEVICE.with_memory_kind("pinned_host")


@pytest.mark.parametrize("turns", [1, 2, 6])
def test_every_block_is_updated_once_and_keeps_its_place(turns):
    rng = np.random.default_rng(turns)
    a, b = rng.integers(0, 9, (6, 4, 2)), rng.integers(0, 9, (12,))

    @jax.jit
    def update(a, b):
        def visit(turn, state):
            a, b = state
            for block in range(2):
                here = turn.arrive(a, block, 2)
                a = turn.leave(a, 10 * here + block + 2 * turn.index, block, 2)
            return a, turn.leave(b, 10 * turn.arrive(b) + turn.index)

        a, b = jax.device_put((visits.cut(a, 2), b), jax.memory.Space.Host)
        return visits.in_turns(turns, (a, b), visit)

    ours, other = update(a, b)
    assert {ours.sharding.memory_kind, other.sharding.memory_kind} == {"pinned_host"}
    # Half of the second axis at a time, in order, within each turn's rows of the first.
    which = np.arange(6 * 2) * 2 * turns // 12
    np.testing.assert_array_equal(ours.reshape(12, 2, 2), 10 * a.reshape(12, 2, 2) + which[:, None, None])
    np.testing.assert_array_equal(other, 10 * b + np.arange(12) * turns // 12)


SHAPES = {"moe_layers": {"a": (3, 8, 5), "b": (3, 6), "scale": (3, 4)}, "embedding": (9, 4), "scale": (4,)}


def random(seed):
    rng = np.random.default_rng(seed)
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))
    return tree.unflatten([rng.standard_normal(shape).astype(np.float32) for shape in shapes])


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_the_largest_arrays_leave_until_the_share_is_there(share):
    config = OptimizerConfig(memory="host", host_share=share)
    # 120 + 18 + 12 + 36 + 4 = 190 numbers: 120 are 63% of them, with 36 more 82%.
    away = {1.0: {120, 36, 18, 12, 4}, 0.8: {120, 36}, 0.5: {120}}[share]
    params = random(0)
    there = optimizer.in_host_memory(params, config)
    found = zip(jax.tree.leaves(params), jax.tree.leaves(there), strict=True)
    assert {x.size for x, is_there in found if is_there} == away
    assert not any(jax.tree.leaves(optimizer.in_host_memory(params, OptimizerConfig())))


@pytest.mark.parametrize(("block_bytes", "share"), [(visits.BLOCK_BYTES, 1.0), (32, 1.0), (32, 0.8)])
def test_moments_and_average_are_the_same_in_host_memory(monkeypatch, block_bytes, share):
    monkeypatch.setattr(visits, "BLOCK_BYTES", block_bytes)

    def run(memory, place):
        settings = OptimizerConfig(moment_dtype="bfloat16", host_share=share)
        config = dataclasses.replace(settings, memory=memory)
        params = jax.device_put(random(0), DEVICE)
        moments = optimizer.init(params, config)
        away = optimizer.in_host_memory(params, config)
        places = jax.tree.map(lambda there: place if there else DEVICE, away)
        layout = moments._replace(count=DEVICE, mu=places, nu=places)
        params_layout = jax.tree.map(lambda _: DEVICE, params)
        ema_layout = ema.shardings(params_layout, memory)

        def update(params, moments, grads, finite):
            return optimizer.adamw_update(params, grads, moments, 0.01, 0.7, config, finite)

        step = jax.jit(update, donate_argnums=(0, 1), out_shardings=(params_layout, layout))
        mix, average = ema.make_update(0.9, ema_layout), ema.init(params, ema_layout)
        moments = jax.device_put(moments, layout)
        for i in range(3):
            params, moments = step(params, moments, random(i + 1), i != 1)
            average = mix(average, params, jax.numpy.asarray(i != 1))
        for found in (moments.mu, moments.nu):
            assert jax.tree.map(lambda x: x.sharding, found) == places
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)} == {place.memory_kind}
        return jax.device_get((params, moments, average))

    ours, plain = run("host", HOST), run("device", DEVICE)
    # The same arithmetic in other programs, where products and sums may contract: a rounding of float32 each,
    # and for moments of bf16 that lie between two of its numbers, one of them.
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        few = 2**-7 if x.dtype == jax.numpy.bfloat16 else 1e-6
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=few, atol=1e-6)

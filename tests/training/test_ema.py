"""The moving average against its recurrence in float64, next to a step that donates the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.training import ema

DECAY = 0.9
MEMORIES = [("device", "device"), ("host", "pinned_host")]


def make_params() -> dict:
    normal = np.random.default_rng(0).standard_normal
    return {
        "a": {"kernel": jnp.asarray(normal((16, 8)), jnp.float32)},
        "b": jnp.asarray(normal(4), jnp.float32),
    }


def place(params: dict) -> dict:
    return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)


@pytest.mark.parametrize(("memory", "kind"), MEMORIES)
def test_follows_the_recurrence_while_steps_donate_the_parameters(memory, kind):
    params = make_params()
    layout = ema.shardings(place(params), memory)
    average, update = ema.init(params, layout), ema.make_update(DECAY, layout)
    step = jax.jit(lambda tree, i: jax.tree.map(lambda p: p * 0.9 + i, tree), donate_argnums=0)

    weights = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = weights
    for i in range(20):
        params = step(params, i)
        # Every seventh step is a bad one: it leaves the average alone.
        average = update(average, params, jnp.asarray(i % 7 != 3))
        weights = jax.tree.map(lambda w, i=i: w * 0.9 + i, weights)
        if i % 7 != 3:
            expected = jax.tree.map(lambda e, w: DECAY * e + (1 - DECAY) * w, expected, weights)

    for leaf, exact in zip(jax.tree.leaves(average), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.memory_kind == kind and leaf.dtype == jnp.float32
        # Twenty fp32 steps of values up to 100: each rounds by 6e-8 of them.
        np.testing.assert_allclose(leaf, exact, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(("memory", "kind"), MEMORIES)
def test_starts_as_a_copy_of_the_parameters(memory, kind):
    params = make_params()
    expected = jax.tree.map(np.array, params)
    average = ema.init(params, ema.shardings(place(params), memory))
    jax.jit(lambda tree: jax.tree.map(lambda p: p + 1, tree), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, average, expected)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)} == {kind}


# Stacked layers, a prime, more rows than slices, a scalar; then arrays that devices share.
SHAPES = {
    "stacked": (3, 4, 5),
    "prime": (37,),
    "table": (96, 2),
    "scalar": (),
    "rows": (8, 6),
    "both": (4, 6),
}
SPECS = {"rows": P("data"), "both": P("data", "expert")}


@pytest.mark.parametrize(("memory", "kind"), MEMORIES)
def test_any_shape_and_layout(memory, kind):
    count = 2 if len(jax.devices()) >= 4 else 1  # More where the run has more devices.
    mesh = Mesh(np.asarray(jax.devices()[: count**2]).reshape(count, count), ("data", "expert"))
    normal = np.random.default_rng(1).standard_normal
    old, new = ({name: normal(shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(2))
    layout = {name: NamedSharding(mesh, SPECS.get(name, P())) for name in SHAPES}
    ema_layout = ema.shardings(layout, memory)
    params = jax.device_put(new, layout)
    average = ema.init(jax.device_put(old, layout), ema_layout)
    average = ema.make_update(DECAY, ema_layout)(average, params, jnp.asarray(True))
    for name, leaf in average.items():
        assert leaf.sharding == ema_layout[name] and leaf.sharding.memory_kind == kind
        # Three fp32 roundings of values near 1.
        exact = DECAY * old[name].astype(np.float64) + (1 - DECAY) * new[name]
        np.testing.assert_allclose(leaf, exact, rtol=0, atol=1e-6)

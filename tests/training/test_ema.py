"""The moving average against its recurrence in float64, next to a step that donates the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MTPConfig, TrainConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import ema, loop
from dsv3_jax.training.state import abstract_state, init_state, shardings
from dsv3_jax.training.step import Schedules

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


@pytest.mark.parametrize("block_bytes", [16, ema.BESIDE_BYTES])
def test_inside_a_step_any_shape_and_layout(monkeypatch, block_bytes):
    monkeypatch.setattr(ema, "BESIDE_BYTES", block_bytes)
    count = 2 if len(jax.devices()) >= 4 else 1
    mesh = Mesh(np.asarray(jax.devices()[: count**2]).reshape(count, count), ("data", "expert"))
    normal = np.random.default_rng(2).standard_normal
    old, new = ({name: normal(shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(2))
    layout = {name: NamedSharding(mesh, SPECS.get(name, P())) for name in SHAPES}
    places = ema.shardings(layout, "host")

    def step(average, params, changed, batch):
        return ema.update_beside(DECAY, places, average, params, changed, batch, streams=False)

    update = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    params = jax.device_put(new, layout)
    for changed in (True, False):
        average = ema.init(jax.device_put(old, layout), places)
        average, batch = update(average, params, changed, jnp.arange(3))
        np.testing.assert_array_equal(batch, np.arange(3))
        for name, leaf in average.items():
            assert leaf.sharding == places[name] and leaf.sharding.memory_kind == "pinned_host"
            exact = DECAY * old[name].astype(np.float64) + (1 - DECAY) * new[name] if changed else old[name]
            # As above; and to the bit where the last step changed nothing.
            np.testing.assert_allclose(leaf, exact, rtol=0, atol=1e-6 if changed else 0)


def test_an_average_a_step_behind_catches_up(monkeypatch):
    """Against the recurrence in float64 of the parameters that the same run went through."""
    monkeypatch.setattr(ema, "is_beside_step", lambda *_: True)
    attention = AttentionConfig(kind="gqa", n_heads=2, n_kv_heads=1, head_dim=4)
    model = ModelConfig(vocab_size=31, d_model=16, d_ff=16, n_layers=1, attention=attention, mtp=MTPConfig(1))
    train = TrainConfig(seq_len=8, batch_size=2, precision="fp32", ema_decay=DECAY, ema_memory="host")
    config = Config(model=model, train=train, mesh=MeshConfig(data=1, expert=1))
    mesh = make_mesh(config.mesh)
    steps, first = loop.Steps(config, mesh), init_state(config, mesh)
    layout = ema.shardings(shardings(abstract_state(config, mesh).params), "host")
    state = {"train": first, "ema": ema.init(first.params, layout)}

    def float64(tree):
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]

    exact = [float64(first.params)]  # After each step.
    for i in range(6):
        tokens = np.random.default_rng(i).integers(0, 31, (2, 8)).astype(np.int32)
        rows = {
            "tokens": tokens,
            "targets": tokens,
            "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
        }
        rows |= {"segment_ids": np.ones((2, 8), np.int32), "loss_mask": np.ones((2, 8), bool)}
        batch, count = loop.put_batch(config, mesh, rows, 2)
        rates = Schedules(*map(jnp.float32, (0.1, 0.0, np.nan if i % 3 == 1 else 0.0)))
        metrics = steps(state, batch, count, rates)
        assert bool(metrics.finite) == (i % 3 != 1)
        now = float64(state["train"].params)
        mixed = [DECAY * e + (1 - DECAY) * p for e, p in zip(exact[-1], now, strict=True)]
        exact.append(mixed if i % 3 != 1 else exact[-1])
        behind = 1
        if i in (1, 2, 5):  # After a step that changed nothing, after one that did, and at the end.
            steps.catch_up(state)
            steps.catch_up(state)  # There is nothing more to catch up with.
            behind = 0
        for leaf, wanted in zip(jax.tree.leaves(state["ema"]), exact[len(exact) - 1 - behind], strict=True):
            # Six fp32 steps of values near 1; one parameter moves by 0.1 a step, the average by 0.01.
            np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-6)

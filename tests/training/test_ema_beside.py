"""The average that a step updates, against its recurrence in float64. On CPU in order, without streams."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MTPConfig, TrainConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import ema, ema_beside, loop
from dsv3_jax.training.state import abstract_state, init_state, shardings
from dsv3_jax.training.step import Schedules

DECAY = 0.9
DEVICE = SingleDeviceSharding(jax.devices()[0])
SHAPES = {"large": (3, 8, 5), "second": (7, 6), "one": (2, 1, 3), "scale": (4,), "scalar": ()}


def random(seed):
    normal = np.random.default_rng(seed).standard_normal
    return {name: np.asarray(normal(shape), np.float32) for name, shape in SHAPES.items()}


def test_divisions_cover_every_block_once_and_share_bytes(monkeypatch):
    monkeypatch.setattr(ema_beside, "BLOCK_BYTES", 20)
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in SHAPES.values()]
    total = sum(x.size for x in arrays)
    for x, division in zip(arrays, ema_beside.divisions(arrays), strict=True):
        pieces = division.pieces()
        blocks = [block for start, count in pieces for block in range(start, start + count)]
        assert blocks == list(range(division.turns)) and x.size % division.turns == 0
        assert division.turns == 1 or min(count for _, count in pieces) > 1
        # Blocks cannot be cut: a piece may have one more than its share.
        block = x.size // division.turns
        assert max(count for _, count in pieces) * block <= total * ema_beside.LARGEST_SHARE + block
    assert len(ema_beside.divisions(arrays)[0].pieces()) == 3  # 120 of 173 numbers.


@pytest.mark.parametrize("block_bytes", [20, ema_beside.BLOCK_BYTES])
def test_any_shape_inside_a_program(monkeypatch, block_bytes):
    monkeypatch.setattr(ema_beside, "BLOCK_BYTES", block_bytes)
    old, new = random(1), random(2)
    places = ema.shardings(jax.tree.map(lambda _: DEVICE, old), "host")
    keeper = ema_beside.Keeper(old, places)

    divided = jax.tree.map(lambda x: x.sharding, ema_beside.abstract_average(old, places))

    def update(average, params, changed, batch):
        return ema_beside.update(DECAY, average, params, changed, batch, lanes=0)

    step = jax.jit(update, donate_argnums=0, out_shardings=(divided, DEVICE))
    average = ema.init(jax.device_put(old, DEVICE), places)
    for changed in (True, False, True):
        before = jax.tree.map(np.array, average)
        apart, batch = step(keeper.apart(average), jax.device_put(new, DEVICE), changed, jnp.arange(3))
        np.testing.assert_array_equal(batch, np.arange(3))
        assert sum(map(len, apart.aside)) == (2 if block_bytes == 20 else 0)
        average = keeper.whole(apart)
        for name, leaf in average.items():
            assert leaf.sharding.memory_kind == "pinned_host" and leaf.shape == SHAPES[name]
            exact = DECAY * before[name].astype(np.float64) + (1 - DECAY) * new[name]
            # Three fp32 roundings of values near 1; and to the bit where the last step changed nothing.
            wanted = exact if changed else before[name]
            np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-6 if changed else 0)


@pytest.mark.parametrize("block_bytes", [20, ema_beside.BLOCK_BYTES])
def test_on_a_mesh_each_device_updates_its_own_part(monkeypatch, block_bytes):
    """The same bits as by a program of its own, and nothing travels between devices."""
    monkeypatch.setattr(ema_beside, "BLOCK_BYTES", block_bytes)
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    sizes = {"large": (4, 8, 16), "second": (8, 6), "one": (2, 1, 3), "scale": (4,), "scalar": ()}
    specs = {"large": P(None, "expert", "data"), "second": P(("data", "expert")), "one": P("data")}
    places = {name: NamedSharding(mesh, specs.get(name, P())) for name in sizes}
    normal = np.random.default_rng(0).standard_normal
    old, new = (
        {name: jax.device_put(np.float32(normal(size)), places[name]) for name, size in sizes.items()}
        for _ in range(2)
    )
    layout, rows = ema.shardings(places, "host"), NamedSharding(mesh, P(None, ("data", "expert")))
    keeper = ema_beside.Keeper(old, layout)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), new)
    divided = jax.tree.map(lambda x: x.sharding, ema_beside.abstract_average(old, layout))
    update = ema_beside.make_update(DECAY, shapes, rows, lanes=0)
    step = jax.jit(update, donate_argnums=0, out_shardings=(divided, rows))
    batch = jax.device_put(np.arange(16.0).reshape(1, 8, 2), rows)
    apart = keeper.apart(ema.init(old, layout))
    assert any(apart.aside) == (block_bytes == 20)
    program = step.lower(apart, new, jnp.bool_(True), batch).compile()
    assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", program.as_text())
    apart, same = program(apart, new, jax.device_put(True, NamedSharding(mesh, P())), batch)
    np.testing.assert_array_equal(same, batch)
    wanted = ema.make_update(DECAY, layout)(ema.init(old, layout), new, jnp.bool_(True))
    for name, leaf in keeper.whole(apart).items():
        assert leaf.sharding == layout[name]
        np.testing.assert_array_equal(leaf, wanted[name])


def batch_of(config, mesh, i):
    tokens = np.random.default_rng(i).integers(0, 31, (2, 8)).astype(np.int32)
    rows = {"tokens": tokens, "targets": tokens, "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1))}
    rows |= {"segment_ids": np.ones((2, 8), np.int32), "loss_mask": np.ones((2, 8), bool)}
    return loop.put_batch(config, mesh, rows, 2)


@pytest.mark.parametrize(
    "devices", [MeshConfig(data=1, expert=1), MeshConfig(data=2, expert=1, sharding="fsdp")], ids=["1", "2"]
)
def test_an_average_a_step_behind_catches_up_and_survives_a_restart(monkeypatch, devices):
    """Against the recurrence of the parameters that the same run went through."""
    monkeypatch.setattr(ema_beside, "applies", lambda *_: True)
    monkeypatch.setattr(ema_beside, "BLOCK_BYTES", 128)
    attention = AttentionConfig(kind="gqa", n_heads=2, n_kv_heads=1, head_dim=4)
    model = ModelConfig(vocab_size=31, d_model=16, d_ff=16, n_layers=1, attention=attention, mtp=MTPConfig(1))
    train = TrainConfig(seq_len=8, batch_size=2, precision="fp32", ema_decay=DECAY, ema_memory="host")
    config = Config(model=model, train=train, mesh=devices)
    mesh = make_mesh(config.mesh)
    shapes, first = abstract_state(config, mesh).params, init_state(config, mesh)
    layout = ema.shardings(shardings(shapes), "host")
    steps = loop.Steps(config, mesh, shapes, layout)
    state = {"train": first, "ema": ema.init(first.params, layout)}
    other = {"train": init_state(config, mesh), "ema": ema.init(first.params, layout)}
    rates = [Schedules(*map(jnp.float32, (0.1, 0.0, 0.0 if i % 3 != 1 else np.nan))) for i in range(6)]

    def float64(tree):
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]

    exact = float64(first.params)
    for i in range(6):
        metrics = steps(state, *batch_of(config, mesh, i), rates[i])
        assert bool(metrics.finite) == (i % 3 != 1)
        if metrics.finite:
            now = float64(state["train"].params)
            exact = [DECAY * e + (1 - DECAY) * p for e, p in zip(exact, now, strict=True)]
        assert "ema" not in state
        if i in (1, 2, 5):  # After a step that changed nothing, after one that did, and at the end.
            steps.catch_up(state)
            steps.catch_up(state)  # There is nothing more to catch up with.
            for leaf, wanted in zip(jax.tree.leaves(state["ema"]), exact, strict=True):
                # Six fp32 steps of values near 1; one parameter moves by 0.1 a step, the average by 0.01.
                np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-6)
        if i == 2:  # As a new process would go on, from a checkpoint.
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            state = jax.device_put(jax.device_get(state), places)
            monkeypatch.setattr(steps, "_keeper", ema_beside.Keeper(shapes, layout))

    for i in range(6):
        steps(other, *batch_of(config, mesh, i), rates[i])
    steps.catch_up(other)
    for ours, theirs in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(other["ema"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)

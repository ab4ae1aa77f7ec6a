"""What surrounds the step: batches, schedules, evaluation, metrics."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    TrainConfig,
)
from dsv3_jax.data import Loader
from dsv3_jax.model import init_variables
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import loop
from dsv3_jax.training.losses import Losses
from dsv3_jax.training.state import make_model
from dsv3_jax.training.step import Metrics, Schedules
from tests.model.translate import to_oracle
from tests.oracles import transformer

TRAIN = TrainConfig(seq_len=16, batch_size=8, micro_batch_size=2, precision="fp32", eval_batches=2)
CONFIG = Config(
    model=ModelConfig(
        vocab_size=264,
        d_model=8,
        n_layers=1,
        init_std=0.3,
        attention=AttentionConfig(kind="mqa", n_heads=2, head_dim=4),
        moe=MoEConfig(n_dense_layers=0, n_experts=4, d_ff_expert=4),
    ),
    train=TRAIN,
    mesh=MeshConfig(data=1),
)


def rows(sequences):
    tokens = np.arange(sequences * 16, dtype=np.int32).reshape(sequences, 16)
    return {"tokens": tokens, "loss_mask": tokens % 3 > 0}


@pytest.mark.parametrize("devices", [1, 2])
def test_batches_are_cut_into_micro_batches_in_order(devices):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=devices))
    batch, count = loop.put_batch(config, make_mesh(config.mesh), rows(8), 8)
    assert count == 4
    np.testing.assert_array_equal(batch["tokens"], rows(8)["tokens"].reshape(4, 2, 16))
    np.testing.assert_array_equal(batch["loss_mask"], rows(8)["loss_mask"].reshape(4, 2, 16))
    assert batch["tokens"].sharding.shard_shape((4, 2, 16)) == (4, 2 // devices, 16)


def test_a_ramp_leaves_room_for_the_whole_batch():
    train = dataclasses.replace(TRAIN, ramp_start_batch=2, ramp_until=0.5)
    config = dataclasses.replace(CONFIG, train=train)
    batch, count = loop.put_batch(config, make_mesh(config.mesh), rows(4), 4)
    assert count == 2 and batch["tokens"].shape == (4, 2, 16)
    np.testing.assert_array_equal(batch["tokens"][:2], rows(4)["tokens"].reshape(2, 2, 16))
    assert not np.asarray(batch["loss_mask"][2:]).any()
    whole = dataclasses.replace(TRAIN, micro_batch_size=0)
    assert loop.micro_batch_size(dataclasses.replace(CONFIG, train=whole)) == 8


def test_schedules_are_float32_scalars_of_the_step():
    moe = dataclasses.replace(CONFIG.model.moe, bias_speed=0.5, bias_until=0.5)
    mtp = MTPConfig(depth=1, loss_weight=0.3, final_loss_weight=0.1, loss_weight_until=0.25)
    model = dataclasses.replace(CONFIG.model, moe=moe, mtp=mtp)
    config = dataclasses.replace(CONFIG, model=model, train=dataclasses.replace(TRAIN, token_budget=1000))
    early, late = loop.schedules_at(config, 0, 0), loop.schedules_at(config, 9, 500)
    assert {(value.dtype, np.shape(value)) for value in (*early, *late)} == {(np.dtype(np.float32), ())}
    assert (early.bias_speed, late.bias_speed) == (0.5, 0)
    assert (early.mtp_weight, late.mtp_weight) == (np.float32(0.3), np.float32(0.1))
    assert 0 < early.learning_rate < late.learning_rate  # Warming up.


@pytest.fixture
def text_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        words = " ".join(rng.choice(["def", "return", "x", "+", "1"], 80))
        (folder / f"{number:02d}.txt").write_text(words, "utf-8")
    return DataConfig(
        source=f"files:{folder}/*.txt", cache_dir=str(tmp_path / "cache"), validation_fraction=0.3
    )


def test_evaluation_is_the_mean_over_held_out_tokens(text_files):
    """Against the oracle on the same sequences; twice, since every evaluation reads the same ones."""
    config = dataclasses.replace(CONFIG, data=text_files)
    process = {"process_index": 0, "process_count": 1}
    evaluate = loop.make_evaluation(config, make_mesh(config.mesh), process)
    model, rng = make_model(config), np.random.default_rng(3)
    shapes = meta.unbox(jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0)))
    draw = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)
    loss, counts = evaluate(draw["params"], draw["router"])
    again, _ = evaluate(draw["params"], draw["router"])
    assert loss == again

    loader = Loader(text_files, split="validation", seq_len=16, seed=TRAIN.seed, **process)
    tree = to_oracle(draw["params"], draw["router"], config.model)
    logits, targets, counted, load = [], [], [], 0
    for _ in range(TRAIN.eval_batches):
        batch = loader.take(2)
        for b in range(2):
            out = transformer.forward(tree, batch["tokens"][b], config.model, positions=batch["positions"][b])
            logits.append(out.logits)
            targets.append(batch["targets"][b])
            counted.append(batch["loss_mask"][b])
            load = load + out.routing[0].counts
    loader.close()
    expected = transformer.cross_entropy(*map(np.concatenate, (logits, targets, counted)))
    assert loss == pytest.approx(expected, rel=1e-5)  # float32 sums over 64 tokens.
    np.testing.assert_array_equal(counts, [load])


def metrics():
    parts = Losses(jnp.float32(3.5), jnp.float32(3.0), jnp.ones(1), jnp.float32(0.25))
    counts = jnp.asarray([[3, 1, 0, 0], [1, 1, 1, 1]], jnp.int32)
    return Metrics(parts, jnp.float32(0.5), jnp.asarray(True), counts, jnp.asarray([2.0, 0.0]))


def test_metrics_row():
    rates = Schedules(np.float32(1e-3), np.float32(0), np.float32(0))
    params = meta.unbox(
        jax.eval_shape(lambda key: init_variables(make_model(CONFIG), key), jax.random.key(0))["params"]
    )

    def device(kind, stats):
        return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)

    row = loop.metrics_row(CONFIG, metrics(), rates, params, 1e6, [device("cpu", None)])
    assert row["max_vio"] == 1.0 and row["max_vio_by_layer"].tolist() == [2.0, 0.0]
    found = [
        float(row[name]) for name in ("loss", "ce_loss", "balance_loss", "grad_norm", "tokens_per_second")
    ]
    assert found == [3.5, 3.0, 0.25, 0.5, 1e6]
    assert np.asarray(row["mtp_loss"]).tolist() == [1.0] and row["learning_rate"] == np.float32(1e-3)
    assert "mfu" not in row and "peak_memory_gib" not in row
    gpu = device("NVIDIA H200", {"peak_bytes_in_use": 3 * 2**30})
    row = loop.metrics_row(CONFIG, metrics(), rates, params, 1e6, [gpu])
    assert row["peak_memory_gib"] == 3.0
    assert row["mfu"] == pytest.approx(1e6 * loop.flops_per_token(CONFIG, params) / 989e12)


def test_row_names_match_the_rows_of_counts():
    moe = dataclasses.replace(CONFIG.model.moe, n_dense_layers=1)
    model = dataclasses.replace(CONFIG.model, n_layers=3, moe=moe, mtp=MTPConfig(depth=2))
    names = loop.row_names(dataclasses.replace(CONFIG, model=model))
    assert names == ["layer 1", "layer 2", "MTP 1", "MTP 2"]
    dense = dataclasses.replace(model, moe=dataclasses.replace(moe, n_dense_layers=3))
    assert loop.row_names(dataclasses.replace(CONFIG, model=dense)) == []

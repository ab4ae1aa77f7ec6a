"""Parameters put together from their parts: the values, and what happens to their gradients."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from dsv3_jax.parallel.gather import look_up, whole
from dsv3_jax.parallel.mesh import expert_layout, make_mesh, use_mesh
from dsv3_jax.pipeline import layout as pipeline_layout
from dsv3_jax.training.losses import cross_entropy
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, make_train_step

# Experts that the replicas divide are split as experts, others along their rows.
SHAPES = {
    (8, 3, 2): (("expert", "data"), None, None),
    (2, 4, 3): ("expert", "data", None),
    (2, 3, 5): ("expert", None, None),
}


@pytest.mark.parametrize("travels", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_put_together_and_gradients_are_summed_in_float32(shape, travels):
    options = MeshConfig(data=4, expert=2, sharding="fsdp", gradient_dtype=travels)
    mesh = make_mesh(options)
    with use_mesh(mesh, options):
        layout = expert_layout(shape)
    assert layout.spec == P(*SHAPES[shape])

    # What the replicas multiply with. Neither 259, their sum, nor 257 is a bfloat16 number: 256 travels.
    rounded = travels == "bfloat16" and shape != (2, 3, 5)  # Where nothing is split nothing is rounded.
    factors = np.repeat(np.float32([[257 if rounded else 256], [1], [1], [1]]), 2, axis=0)
    batch = P(("data", "expert"))

    def local(factor, part):
        w = whole(part, layout, jnp.float32 if rounded else jnp.bfloat16)
        return factor * w.astype(jnp.float32).sum(), w[None].astype(jnp.float32)

    def outputs(w):
        specs = dict(in_specs=(batch, layout.spec), out_specs=(batch, P("data", "expert")))
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(factors, w)

    w = np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)
    gradient, (_, copies) = jax.jit(jax.grad(lambda w: (outputs(w)[0].sum(), outputs(w)), has_aux=True))(w)
    for copy in np.asarray(copies):
        np.testing.assert_array_equal(copy, w)
    np.testing.assert_array_equal(gradient, np.full(shape, 259))


def program(mesh, precision="bf16", remat="none"):
    """The traced step of a small run: a layer of experts that is scanned, and a loss in two chunks."""
    moe = MoEConfig(n_dense_layers=0, n_experts=4, top_k=2, d_ff_expert=8)
    model = ModelConfig(vocab_size=16, d_model=8, n_layers=2, moe=moe, attention=AttentionConfig(kind="mqa"))
    train = TrainConfig(precision=precision, remat=remat, seq_len=8, batch_size=2, loss_chunk=4)
    config = Config(model=model, train=train, mesh=mesh)
    on = make_mesh(mesh)
    shape = jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), shape)
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape.shape, jnp.bool_)
    step, count = make_train_step(config, on), jax.ShapeDtypeStruct((), jnp.int32)
    return str(step.trace(abstract_state(config, on), batch, count, Schedules(1e-3, 0.0, 0.0)).jaxpr)


@pytest.mark.parametrize("remat", ["dots", "v3"])
def test_zero1_gathers_once_and_fsdp_again_for_the_backward_pass(remat):
    gathers = {}
    for sharding in ("zero1", "fsdp"):
        text = program(MeshConfig(data=2, expert=1, sharding=sharding), remat=remat)
        # Both matrices of the one layer that is scanned.
        gathers[sharding] = text.count(" = all_gather[")
    assert gathers == {"zero1": 2, "fsdp": 4}


@pytest.mark.parametrize("travels", ["float32", "bfloat16"])
def test_gradients_travel_as_asked(travels):
    text = program(MeshConfig(data=2, expert=1, sharding="zero1", gradient_dtype=travels))
    lines = [line for line in text.splitlines() if " = reduce_scatter[" in line or " = all_to_all[" in line]
    found = Counter(re.sub(r".*:(\w+)\[[\d,]*\] = (\w+)\[", r"\2 \1", line) for line in lines)
    # Two matrices of experts, embedding and head.
    assert found == {{"float32": "reduce_scatter f32", "bfloat16": "all_to_all bf16"}[travels]: 4}


@pytest.mark.parametrize("travels", ["float32", "bfloat16"])
def test_embedding_and_head_are_summed_from_what_each_device_has(travels):
    options = MeshConfig(data=4, expert=2, sharding="zero1", gradient_dtype=travels)
    mesh, rng = make_mesh(options), np.random.default_rng(0)
    table, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 24)))
    ids, factor = rng.integers(0, 4, (8, 6)), rng.standard_normal((2, 8, 6, 8)).astype(np.float32)
    targets, weights = rng.integers(0, 24, (8, 6)), np.ones((8, 6), np.float32)

    def loss(table, head, ids, factor, targets, weights):
        first, second = look_up(table, [ids, ids + 1], jnp.float32)
        rows = (first * factor[0]).sum() + (second * factor[1]).sum()
        return rows + cross_entropy(factor[0], head, targets, weights, 3)

    def on_the_mesh(*inputs):
        with use_mesh(mesh, options):
            return jax.grad(loss, (0, 1))(*inputs)

    found = jax.jit(on_the_mesh)(table, head, ids, factor, targets, weights)
    one = jax.jit(jax.grad(loss, (0, 1)))
    addends = [
        one(table, head, ids[i, None], factor[:, i, None], targets[i, None], weights[i, None])
        for i in range(8)  # A row of the batch a device.
    ]
    for ours, *theirs in zip(found, *addends, strict=True):
        whole, sizes = np.sum(theirs, 0, np.float64), np.sum(np.abs(theirs), 0)
        error = np.abs(ours - whole)
        assert ours.dtype == jnp.float32
        # Each addend is rounded once, by 2^-8 of itself at most; float32 sums of 8 by 8 x 2^-24.
        rounding = 0.0 if travels == "float32" else 2**-8
        assert (error <= (rounding + 2**-21) * sizes).all()
        assert (error > 2**-12 * sizes).any() == (travels == "bfloat16")


def test_a_pipeline_sends_to_replicas_as_asked_and_sums_over_pipe_in_float32():
    mesh = make_mesh(MeshConfig(pipe=2, data=2, expert=2))
    axes = (("pipe",), ("data", "expert"))
    # Over pipe 256 + 1; over replicas 257, which is no bfloat16 number, four times: 256 each.
    addends = np.repeat(np.float32([[[256]], [[1]]]), 4, 0) * np.ones((8, 2, 4), np.float32)

    def sums(travels):
        def local(addend):
            return pipeline_layout.scatter(addend[0], axes, ("pipe", "data", "expert"), travels)

        specs = dict(in_specs=P(("pipe", "data", "expert")), out_specs=P("pipe", ("data", "expert")))
        return jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs))(addends)

    np.testing.assert_array_equal(sums("float32"), np.full((2, 4), 4 * 257))
    np.testing.assert_array_equal(sums("bfloat16"), np.full((2, 4), 4 * 256))

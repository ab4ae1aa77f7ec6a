"""Every schedule run on fake devices beside the same model without a pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.pipeline import build, place
from dsv3_jax.pipeline.runner import Parts, gradients

D, VOCAB, MICRO, SEQ = 8, 11, 2, 3


def embed(shared, micro):
    return shared["table"][micro["tokens"]]


def body(stage, x, micro, index):
    hidden = jnp.tanh(x @ stage["w"] + stage["b"]) * micro["scale"]
    # An own loss of each stage, and a count, as the balance loss and the load of experts are.
    return x + hidden, 0.01 * jnp.sum(hidden**2), {"positive": jnp.sum(hidden > 0, dtype=jnp.int32)}


def head(shared, x, micro):
    logits = jax.nn.log_softmax(x @ shared["table"].T)
    right = jnp.take_along_axis(logits, micro["tokens"][..., None], -1)
    return -right.sum(), {"certain": jnp.sum(right > -1, dtype=jnp.int32)}


TOY = Parts(embed, body, head)


def toy(n_stages, n_micro, seed=0):
    rng = np.random.default_rng(seed)
    stages = {"w": rng.normal(size=(n_stages, D, D)) / 3, "b": rng.normal(size=(n_stages, D)) / 3}
    batch = {
        "tokens": rng.integers(0, VOCAB, (n_micro, MICRO, SEQ)),
        "scale": rng.uniform(0.5, 2, (n_micro, MICRO, SEQ, 1)),
    }
    as_arrays = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32), tree
    )
    return as_arrays(stages), as_arrays({"table": rng.normal(size=(VOCAB, D))}), as_arrays(batch)


def unpipelined(parts, stages, shared, batch):
    """Loss, gradients and what is counted, by autodiff through all stages, micro-batch after micro-batch."""

    def loss_of(stages, shared):
        def one(total, micro):
            def layer(carry, stage):
                x, total, index = carry
                x, loss, aux = parts.body(stage, x, micro, index)
                return (x, total + loss, index + 1), aux

            start = parts.embed(shared, micro), total, jnp.int32(0)
            (x, total, _), aux = jax.lax.scan(layer, start, stages)
            loss, counted = parts.head(shared, x, micro)
            return total + loss, (aux, counted)

        total, aux = jax.lax.scan(one, jnp.float32(0), batch)
        return total, jax.tree.map(lambda leaf: leaf.sum(0), aux)

    (loss, aux), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(stages, shared)
    return loss, *grads, aux


def pipe(n_ranks, **axes):
    shape = (n_ranks, *axes.values())
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("pipe", *axes))


def compare(parts, schedule, mesh, stages, shared, batch, place_batch=lambda batch: batch):
    table = place(schedule)
    got = jax.jit(lambda *args: gradients(table, mesh, parts, *args))(stages, shared, place_batch(batch))
    loss, d_stages, d_shared, counts = jax.jit(lambda *args: unpipelined(parts, *args))(stages, shared, batch)
    # float32 sums over micro-batches in another order: relative to each array's largest entry.
    for name, ours, want in (
        ("loss", got.loss, loss),
        ("stages", got.stages, d_stages),
        ("shared", got.shared, d_shared),
    ):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-6, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, (got.body, got.head), counts)


CASES = [
    ("gpipe", 2, 3),
    ("1f1b", 4, 5),
    ("interleaved", 2, 4),
    ("zb1p", 4, 6),
    ("dualpipe", 2, 4),
    ("dualpipe", 8, 18),
    ("dualpipev", 2, 5),
]


@pytest.mark.parametrize("name, ranks, count", CASES)
def test_equal_to_the_model_without_a_pipeline(name, ranks, count):
    schedule = build(name, ranks, count)
    compare(TOY, schedule, pipe(ranks), *toy(schedule.n_stages, count))


def test_a_data_axis_beside_the_pipeline():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    schedule = build("dualpipe", 4, 8)
    mesh = pipe(4, data=2)
    split = lambda batch: jax.device_put(batch, NamedSharding(mesh, P(None, "data")))  # noqa: E731
    compare(TOY, schedule, mesh, *toy(4, 8), place_batch=split)


def test_the_program_does_not_grow_with_micro_batches():
    def size(count):
        table, mesh = place(build("dualpipe", 2, count)), pipe(2)
        lowered = jax.jit(lambda *args: gradients(table, mesh, TOY, *args)).lower(*toy(2, count))
        # Tables are constants of the text; operations are lines.
        return lowered.as_text().count("\n")

    assert size(8) == size(64)


def test_a_slot_that_is_read_too_early_shows():
    import dataclasses

    schedule = build("1f1b", 2, 3)
    table = place(schedule)
    # Rank 1's first input lies in a slot that nothing is sent to.
    value = next(value for value in table.slots if value.kind == "input" and value.microbatch == 0)
    moved = dataclasses.replace(
        table,
        slots={**table.slots, value: 0},
        sends=(),
        ticks=((table.ticks[0][0], schedule.cells[1][0]), *table.ticks[1:]),
    )
    stages, shared, batch = toy(2, 3)
    result = jax.jit(lambda *args: gradients(moved, pipe(2), TOY, *args))(stages, shared, batch)
    assert not np.isfinite(result.loss)


def test_what_does_not_fit_is_refused():
    table = place(build("1f1b", 2, 3))
    stages, shared, batch = toy(2, 3)
    with pytest.raises(ValueError, match="mesh axis pipe is 4: the table has 2"):
        gradients(table, pipe(4), TOY, stages, shared, batch)
    with pytest.raises(ValueError, match="leading axis of stages is 3: the table has 2"):
        gradients(table, pipe(2), TOY, toy(3, 3)[0], shared, batch)
    with pytest.raises(ValueError, match="leading axis of batch is 4: the table has 3"):
        gradients(table, pipe(2), TOY, stages, shared, toy(2, 4)[2])

"""Every schedule run on fake devices beside backpropagation in float64 numpy, with no pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from dsv3_jax.pipeline import ScheduleError, build, place
from dsv3_jax.pipeline.runner import Parts, gradients
from tests.pipeline.runs import OPTIONS

VOCAB, ROWS, SEQ = 11, 2, 3

# A model of few operations, as compilation is what takes the time. Each stage has a loss and a count of its
# own, as the balance loss and the load of experts are; the head uses the embedding again, as tied ones do.


def embed(shared, micro):
    return shared["table"][micro["tokens"]]


def body(stage, x, micro, index):
    hidden = jnp.tanh(x * stage["w"])
    counted = {"positive": jnp.sum(hidden > 0, dtype=jnp.int32)}
    return x + hidden * micro["scale"], 0.01 * jnp.sum(hidden**2), counted


def head(shared, x, micro):
    error = x - shared["table"][micro["targets"]]
    return 0.5 * jnp.sum(error**2), {"over": jnp.sum(error > 0, dtype=jnp.int32)}


TOY = Parts(embed, body, head)


def toy(n_stages, n_micro, seed=0):
    """(stages, shared, batch) as float32 and int32 numpy arrays."""
    rng = np.random.default_rng(seed)
    shape = n_micro, ROWS, SEQ
    stages = {"w": (rng.normal(size=n_stages) / 3).astype(np.float32)}
    batch = {name: rng.integers(0, VOCAB, shape).astype(np.int32) for name in ("tokens", "targets")}
    batch["scale"] = rng.uniform(0.5, 2, shape).astype(np.float32)
    return stages, {"table": rng.normal(size=VOCAB).astype(np.float32)}, batch


def by_hand(stages, shared, batch):
    """(loss, d stages, d table, positive [stage], over) in float64, by the chain rule written out."""
    weights, table = stages["w"].astype(np.float64), shared["table"].astype(np.float64)
    tokens, targets, scale = batch["tokens"], batch["targets"], batch["scale"].astype(np.float64)
    xs, hiddens = [table[tokens]], []
    for w in weights:
        hiddens.append(np.tanh(xs[-1] * w))
        xs.append(xs[-1] + hiddens[-1] * scale)
    error = xs[-1] - table[targets]
    loss = 0.5 * (error**2).sum() + 0.01 * sum((hidden**2).sum() for hidden in hiddens)
    d_table, d_weights, dx = np.zeros_like(table), np.zeros_like(weights), error
    np.add.at(d_table, targets, -error)
    for stage in reversed(range(len(weights))):
        d_inner = (dx * scale + 0.02 * hiddens[stage]) * (1 - hiddens[stage] ** 2)
        d_weights[stage] = (d_inner * xs[stage]).sum()
        dx = dx + d_inner * weights[stage]
    np.add.at(d_table, tokens, dx)
    return loss, d_weights, d_table, [(hidden > 0).sum() for hidden in hiddens], (error > 0).sum()


def pipe(n_ranks, **axes):
    shape = (n_ranks, *axes.values())
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("pipe", *axes))


def compare(schedule, mesh, seed=0, dtype=np.float32):
    """The worst error of a gradient, relative to the array's largest entry."""
    table, arguments = place(schedule), toy(schedule.n_stages, schedule.n_microbatches, seed)
    with jax.enable_x64(dtype == np.float64):
        wide = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, arguments)
        step = jax.jit(lambda *args: gradients(table, mesh, TOY, *args))
        got = jax.device_get(step.lower(*wide).compile(OPTIONS)(*wide))
    loss, d_weights, d_table, positive, over = by_hand(*arguments)
    # A rounding is 6e-8, or 1e-16 in float64, of every term and relative to each array's largest entry.
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(got.loss, loss, rtol=tolerance)
    worst = []
    for ours, theirs in ((got.stages["w"], d_weights), (got.shared["table"], d_table)):
        assert ours.dtype == dtype
        worst.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert np.max(worst) <= tolerance
    np.testing.assert_array_equal(got.body["positive"], positive)
    assert got.head["over"] == over
    return np.max(worst)


# Every schedule, 2, 4 and 8 ranks, as many micro-batches as ranks to four times as many.
CASES = [
    ("gpipe", 4, 4),
    ("1f1b", 2, 8),
    ("1f1b", 8, 24),
    ("interleaved", 2, 8),
    ("zb1p", 4, 12),
    ("zb1p", 8, 8),
    ("dualpipe", 2, 8),
    ("dualpipe", 8, 18),
    ("dualpipev", 4, 9),
]


@pytest.mark.parametrize("name, ranks, count", CASES)
def test_equal_to_the_model_without_a_pipeline(name, ranks, count):
    compare(build(name, ranks, count), pipe(ranks))


@settings(max_examples=2, derandomize=True, phases=[Phase.generate])  # Each example is a compilation.
@given(
    st.sampled_from(["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]),
    st.integers(3, 7),
    st.integers(1, 24),
    st.integers(2, 3),
    st.integers(0, 9),
)
def test_any_shape_that_is_not_refused(name, ranks, count, chunks, seed):
    try:
        schedule = build(name, ranks, count, chunks=chunks)
    except ScheduleError:  # The nearest that can be.
        ranks, count = ranks + ranks % 2, max(1, -(-count // ranks)) * ranks
        count = max(count + count % 2, 2 * ranks) if name.startswith("dual") else count + -count % ranks
        schedule = build(name, ranks, count, chunks=chunks)
    # In float64 nothing but rounding is left: a schedule that lost or doubled any term would show.
    compare(schedule, pipe(ranks), seed, np.float64)


def test_axes_beside_the_pipeline():
    compare(build("dualpipe", 4, 8), pipe(4, data=2))


def test_the_program_does_not_grow_with_micro_batches():
    def size(count):
        table, mesh = place(build("dualpipe", 2, count)), pipe(2)
        lowered = jax.jit(lambda *args: gradients(table, mesh, TOY, *args)).lower(*toy(2, count))
        # Tables are constants of the text; operations are lines.
        return lowered.as_text().count("\n")

    assert size(8) == size(64)


def test_a_slot_that_is_read_too_early_shows():
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
    result = jax.jit(lambda *args: gradients(moved, pipe(2), TOY, *args))(*toy(2, 3))
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

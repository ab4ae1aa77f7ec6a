"""Every schedule on 2, 4 and 8 ranks beside no pipeline, in float64: pytest -rP tests/pipeline/grid.py

About 40 minutes of one core, so pytest does not find it unless it is named; every change runs a part of it in
`test_train_step.py`. `-k "dualpipe and mtp2"` runs some of it. Micro-batches and meshes take turns; with
DSV3_GRID=all every schedule has all of them, more than two hours of one core: for many cores, with `-n 22
--maxschedchunk 1`. With 16 devices (XLA_FLAGS) 8 ranks have other axes beside them, too.
"""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsv3_jax.config import MeshConfig
from dsv3_jax.pipeline import NAMES, build
from dsv3_jax.training.state import abstract_state
from pallas_kernels.mla_attention import reference
from tests.pipeline import runs, test_runner

ALL = os.environ.get("DSV3_GRID") == "all"
ROWS = 4  # Of a micro-batch: one for each device beside a pipeline.
MOST = 32  # Micro-batches of the runs without a pipeline, which serve any number up to it.
FSDP = dict(data=2, expert=2, sharding="fsdp")
MESHES = {
    8: (dict(), dict(data=2, sharding="zero1"), dict(expert=2)),
    4: (dict(), dict(data=2, sharding="zero1"), dict(expert=2)),
    2: (dict(), FSDP, dict(data=2, sharding="zero1"), dict(expert=2)),
}


def counts(name, ranks):
    """Micro-batches: the fewest, one that ranks do not divide where that can be, and 4 a rank."""
    fewest = 2 * ranks if name.startswith("dual") else ranks
    between = {"interleaved": 2 * ranks, "dualpipe": fewest + 2}.get(name, fewest + 1)
    return fewest, between, 4 * ranks


def case(name, ranks, axes, mtp, count, experts="reference", **fields):
    stages = ranks * (2 if name in ("interleaved", "dualpipev") else 1)
    # Without prediction: a dense layer first, and stages of one layer and of two.
    uneven = mtp == 0
    moe = dict(batch_loss=0.1, n_shared=0, n_dense_layers=int(uneven), implementation=experts)
    mesh = MeshConfig(pipe=ranks, **dict(data=1) | axes)
    return runs.config(name, count, mesh, mtp, layers=stages + uneven, rows=ROWS * count, moe=moe, **fields)


def fitting(ranks):
    """The meshes that there are devices for."""
    fit = jax.device_count() // ranks
    return [axes for axes in MESHES[ranks] if axes.get("data", 1) * axes.get("expert", 1) <= fit]


def grid():
    """Every schedule, number of ranks and prediction depth, alone and beside other axes.

    All products of them, or one of the numbers of micro-batches and one of the other meshes for each.
    """
    last_first = list(enumerate(NAMES))[::-1]  # Which take the longest to compile.
    for (number, name), ranks, mtp in itertools.product(last_first, MESHES, range(3)):
        alone, *more = fitting(ranks)
        beside = more if ALL or not more else [more[(mtp + number) % len(more)]]
        for turn, axes in enumerate([alone, *beside]):
            words = "x".join(f"{axis}{size}" for axis, size in axes.items() if axis != "sharding")
            where = f"{name} {ranks} {words or 'alone'} mtp{mtp}"
            taken = counts(name, ranks)
            for count in taken if ALL else [taken[(mtp + number + turn) % 3]]:
                yield pytest.param(name, ranks, axes, mtp, count, id=f"{where} {count}")


@pytest.fixture(scope="module")
def width(request):
    """`jnp.float32`, or float64 wherever the program says float32."""
    caches = abstract_state, runs.plain  # By configuration, which does not say.
    for cache in caches:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(request.param == "float64"):
        patch.setattr(jnp, "float32", getattr(jnp, request.param))
        if request.param == "float64":
            patch.setattr(reference, "_dot", jnp.einsum)  # It took its dtype when it was imported.
        yield
    for cache in caches:
        cache.cache_clear()


in_float64 = pytest.mark.parametrize("width", ["float64"], indirect=True, scope="module")
in_float32 = pytest.mark.parametrize("width", ["float32"], indirect=True, scope="module")


def errors(c, micros=None):
    found = runs.errors(c, micros)
    jax.clear_caches()  # Hundreds of programs would fill the memory.
    print(found)
    return found


def equal(found):
    # A rounding is 1.1e-16: sums of some 1,000 terms in another order, most of them not of one sign.
    return found.loss <= 1e-13 and found.entry <= 1e-12 and found.norm <= 1e-12 and found.counts == 0


def in_stages():
    """Two to 16 layers, the other axes with 2 ranks; all of them: with 4 ranks, too."""
    for name, ranks in itertools.product(NAMES[::-1], MESHES):
        for axes in [FSDP] if ranks == 2 else [dict(), dict(expert=2)] if ALL and ranks == 4 else [dict()]:
            yield pytest.param(name, ranks, axes, id=f"{name} {ranks} {'beside' if axes else 'alone'}")


@in_float32
@pytest.mark.parametrize("name, ranks, axes", list(in_stages()))
def test_float32_by_norm(width, name, ranks, axes):
    # Where a device has half of the experts, the forward pass must still give the same bits: four layers make
    # 1e-6 of a gradient of one rounding in it. "reference" takes one sum over all experts of a device, which
    # rounds by their number; "blocked" does not.
    experts = "blocked" if axes else "reference"
    found = errors(case(name, ranks, axes, 1, counts(name, ranks)[1], experts))
    # Found: up to 6e-7, while both runs are 1e-6 to 2e-5 from float64.
    assert found.loss <= 1e-6 and found.norm <= 1e-6 and found.counts == 0, found


@in_float32
@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_fp8(width, name, mtp):
    c = case(name, 2, {}, mtp, counts(name, 2)[0], precision="fp8")
    found = errors(c)
    # As in `test_train_step.py`; found: up to 1.4e-7, and 6e-4 where a number rounds to another code.
    assert found.norm <= 0.01 and found.loss <= 1e-4 and found.counts == 0, found


@in_float64
@pytest.mark.parametrize("name, ranks, axes, mtp, count", list(grid()))
def test_equal_to_no_pipeline(width, name, ranks, axes, mtp, count):
    found = errors(case(name, ranks, axes, mtp, count), MOST)
    assert equal(found), found


@st.composite
def anything(draw):
    """A run of any schedule, and a model of any shape, that fits eight devices."""
    name, ranks = draw(st.sampled_from(NAMES)), draw(st.sampled_from([2, 4]))
    axes = draw(st.sampled_from([dict(), dict(data=2, sharding="fsdp"), dict(expert=2)]))
    least, _, most = counts(name, ranks)
    count = draw(st.integers(least, most))
    count += {"interleaved": -count % ranks, "dualpipe": count % 2}.get(name, 0)
    stages = ranks * (2 if name in ("interleaved", "dualpipev") else 1)
    layers = stages + draw(st.integers(0, 3))
    heads, experts = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    kinds = [dict(kind="mqa"), dict(kind="mha"), dict(kind="mla", kv_lora_rank=6, q_lora_rank=5)]
    widths = dict(qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, head_dim=4)
    attention = dataclasses.replace(
        runs.MODEL.attention, n_heads=heads, **draw(st.sampled_from(kinds)), **widths
    )
    model = dataclasses.replace(
        runs.MODEL,
        vocab_size=draw(st.integers(5, 30)),
        d_model=draw(st.integers(3, 20)),
        d_ff=draw(st.integers(3, 20)),
        max_seq_len=draw(st.integers(4, 12)),
        attention=attention,
        tie_embeddings=draw(st.booleans()),
    )
    moe = dict(
        n_dense_layers=draw(st.integers(0, layers)),
        n_experts=experts,
        top_k=draw(st.integers(1, experts)),
        n_shared=draw(st.integers(0, 2)),
        d_ff_expert=draw(st.integers(3, 10)),
        batch_loss=0.1,
    )
    rows = count * axes.get("data", 1) * axes.get("expert", 1) * draw(st.integers(1, 2))
    mesh = MeshConfig(pipe=ranks, **dict(data=1) | axes)
    remat, mtp = draw(st.sampled_from(["none", "full", "dots", "v3"])), draw(st.integers(0, 2))
    return runs.config(name, count, mesh, mtp, layers, rows, model, remat=remat, moe=moe)


@in_float64
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(c=anything())
def test_any_shape(width, c):
    print(c.train.pipeline, c.mesh, c.train.batch_size, c.train.micro_batch_size, c.train.remat, c.model)
    found = errors(c)
    runs.plain.cache_clear()
    assert equal(found), found


@pytest.mark.parametrize("ranks", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_micro_batches(name, ranks):
    """Of a model of two numbers, which compiles in a second, beside float64 numpy."""
    least, _, most = counts(name, ranks)
    step = {"interleaved": ranks, "dualpipe": 2}.get(name, 3 if ranks == 8 else 1)
    done = [*range(least, most, step), most]
    print(
        len(done),
        max(test_runner.compare(build(name, ranks, n), test_runner.pipe(ranks), n, np.float64) for n in done),
    )
    jax.clear_caches()

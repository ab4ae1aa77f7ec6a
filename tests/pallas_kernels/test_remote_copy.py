"""`remote_all_to_all` against numpy: interpreted for TPU, compiled for both, run where there are two GPUs."""

import functools
import os

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import UnsupportedError, target_platform
from pallas_kernels.remote_copy import mosaic_tpu, reference, remote_all_to_all

lowers = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need JAX 0.11.2"
)
RACES = pltpu.InterpretParams(detect_races=True)


def counts(ranks, groups, slots, load, seed=0):
    """[device, peer] slots sent, devices of a group in their order."""
    sent = np.random.default_rng(seed).integers(0, slots + 1, (groups, ranks, ranks)).astype(np.int32)
    if load == "nothing":
        sent[:] = 0
    if load == "everything to one":
        sent[:] = 0
        sent[:, :, -1] = slots
    if load == "skewed":  # A rank that sends nothing, one that is sent nothing, one slot, all slots.
        sent[:, 0], sent[:, :, 0], sent[:, -1, -1], sent[:, 1, -1] = 0, 0, 1, slots
    return sent


def exchanged(buffer, sent, order):
    """[device, source, slot, ...] in numpy, zero where nothing was sent; `order` has each group's devices."""
    out = np.zeros_like(buffer)
    for group, devices in enumerate(order):
        for i, source in enumerate(devices):
            for j, to in enumerate(devices):
                out[to, i, : sent[group, i, j]] = buffer[source, j, : sent[group, i, j]]
    return out


def case(ranks, groups, stride, slots, rest, dtype, load, seed=0):
    """(buffer, sent, received, expected), by device."""
    order = reference.groups(ranks * groups, ranks, stride)
    per_group = counts(ranks, groups, slots, load, seed)
    sent = np.zeros((ranks * groups, ranks), np.int32)
    received = np.zeros_like(sent)
    for group, devices in enumerate(order):
        sent[devices], received[devices] = per_group[group], per_group[group].T
    rng = np.random.default_rng(seed + 1)
    shape = (ranks * groups, ranks, slots, *rest)
    buffer = np.asarray(jnp.asarray(rng.integers(1, 1 << 20, shape)).astype(dtype))
    return buffer, sent, received, exchanged(buffer, per_group, order)


def on_mesh(copy, n_devices, stride):
    """`copy` on every device's part."""
    mesh = Mesh(np.array(jax.devices()[:n_devices]), ("expert",))

    def on_rank(buffer, sent, received):
        return copy(buffer[0], sent[0], received[0], "expert", stride)[None]

    specs = dict(in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    return jax.jit(jax.shard_map(on_rank, mesh=mesh, **specs))


# More slots than a piece of 32 has, not a multiple of it; ranks side by side, and two apart.
@pytest.mark.parametrize(("ranks", "groups", "stride", "slots"), [(4, 1, 1, 40), (2, 2, 2, 70)])
def test_interpreted_for_tpu(ranks, groups, stride, slots, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "PIECE", 1)  # As short as pieces get.
    run = on_mesh(functools.partial(mosaic_tpu.copy, interpret=RACES), ranks * groups, stride)
    for seed, load in enumerate(("skewed", "nothing", "everything to one")):
        buffer, sent, received, expected = case(ranks, groups, stride, slots, (6,), jnp.bfloat16, load, seed)
        np.testing.assert_array_equal(run(buffer, sent, received), expected)
    assert not interpret_pallas_call.races.races_found


def test_the_reference_and_its_gradient():
    """What went out past `sent`, and came in past `received`, has no gradient: the transpose, in numpy."""
    copy = functools.partial(remote_all_to_all, implementation="auto")
    buffer, sent, received, expected = case(2, 2, 1, 5, (3, 2), jnp.float32, "skewed")
    run = on_mesh(copy, 4, 1)
    found, back = jax.vjp(lambda b: run(b, sent, received), buffer)
    np.testing.assert_array_equal(found, expected)
    d_result = np.random.default_rng(3).standard_normal(buffer.shape).astype(np.float32)
    order = reference.groups(4, 2, 1)
    transposed = np.stack([received[devices] for devices in order])
    np.testing.assert_array_equal(back(d_result)[0], exchanged(d_result, transposed, order))


@pytest.fixture
def unchecked_signatures():
    """Calls get through to the op's own checks, as they do outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_calls_are_refused_with_the_reason(unchecked_signatures, monkeypatch):
    x, n = jnp.zeros((2, 4, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        remote_all_to_all(x, n[:1], n, "expert")
    with pytest.raises(ValueError, match="2 and 4 bytes"):
        remote_all_to_all(x.astype(jnp.int8), n, n, "expert")
    with pytest.raises(UnsupportedError, match="0.11.2|not on cpu"):
        remote_all_to_all(x, n, n, "expert", implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="not on cpu"):
        remote_all_to_all(x, n, n, "expert", implementation="mosaic_tpu")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with target_platform("gpu"), pytest.raises(UnsupportedError, match="2 processes"):
        remote_all_to_all(x, n, n, "expert", implementation="mosaic_gpu")


def shapes(n_devices, ranks, slots, rest, dtype, place=None):
    def on_devices(*shape, dtype):
        return jax.ShapeDtypeStruct((n_devices, *shape), dtype, sharding=place)

    return (
        on_devices(ranks, slots, *rest, dtype=dtype),
        *[on_devices(ranks, dtype=jnp.int32)] * 2,
    )


# A row a piece, several, one in parts, one of fewer bytes than a copy moves.
ROWS = [((7168,), jnp.bfloat16), ((2048,), jnp.bfloat16), ((16384,), jnp.float32), ((6,), jnp.int32)]


@lowers
@pytest.mark.parametrize(("rest", "dtype"), ROWS)
def test_lowers_for_gpu(rest, dtype):
    """And asks neither for multicast nor for symmetric memory: the GPUs of a host may have other users."""
    run = on_mesh(functools.partial(remote_all_to_all, implementation="mosaic_gpu"), 4, 2)
    with target_platform("gpu"):
        text = run.trace(*shapes(4, 2, 33, rest, dtype)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1 and "uses_xla_collective_metadata = true" in text
    assert "skip_device_barrier = false" in text
    assert not any(word in text for word in ("symmetric_memory", "multimem", "nvshmem"))


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpu(topology, monkeypatch):
    libtpu = pytest.importorskip("libtpu", reason="needs libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Test workers side by side.
    monkeypatch.setenv("TPU_LIBRARY_PATH", os.environ.get("TPU_LIBRARY_PATH", libtpu.get_library_path()))
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 2, -1), ("pipe", "data", "expert"))
    ranks, rows = mesh.shape["expert"], P(("data", "expert"))

    def on_rank(*arrays):
        return remote_all_to_all(*(a[0] for a in arrays), "expert", implementation="mosaic_tpu")[None]

    run = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    place = NamedSharding(mesh, rows)
    for rest, dtype in (ROWS[0], ROWS[3]):
        with target_platform("tpu"):
            traced = run.trace(*shapes(len(devices), ranks, 1001, rest, dtype, place))
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        assert text.count("tpu_custom_call") == 1


two_gpus = pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two Hopper GPUs in one process"
)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(("rest", "dtype"), ROWS)
def test_on_gpus(rest, dtype):
    """All slots are what they were or zero, whatever the load and what the memory held, every time."""
    n = jax.device_count()
    run = on_mesh(functools.partial(remote_all_to_all, implementation="mosaic_gpu"), n, 1)
    poison = on_mesh(lambda b, *_: jnp.full(b.shape[:-1] + (4096,), jnp.nan, jnp.float32), n, 1)
    for seed, load in enumerate(("random", "skewed", "nothing", "everything to one", "random")):
        arrays = case(n, 1, 1, 333, rest, dtype, load, seed)
        jax.block_until_ready(poison(*arrays[:3]))
        np.testing.assert_array_equal(run(*arrays[:3]), arrays[3], err_msg=load)


@pytest.mark.gpu
@two_gpus
def test_in_a_loop_beside_other_collectives():
    """Counts that each step makes anew from what arrived, and sums over the ranks: as with the reference."""
    n, slots = jax.device_count(), 64

    def steps(implementation):
        def step(buffer, i):
            counts = lambda x: jnp.abs(x[:, 0, 0].astype(jnp.int32)) % (slots + 1)  # noqa: E731
            sent = counts(buffer) + i
            sent = jnp.minimum(sent, slots)
            received = jax.lax.all_to_all(sent, "expert", 0, 0, tiled=True)
            moved = remote_all_to_all(buffer, sent, received, "expert", implementation=implementation)
            total = jax.lax.psum(moved.sum(), "expert")
            return buffer + jnp.roll(moved, 1, axis=1) + total % 7, total

        def on_rank(buffer, *_):
            return jax.lax.scan(step, buffer, jnp.arange(20))[0]

        return on_mesh(lambda b, *_: on_rank(b), n, 1)

    # Whole numbers modulo 2^32: sums in any order are the same.
    arrays = case(n, 1, 1, slots, (96,), jnp.uint32, "random")[:3]
    ours, theirs = steps("mosaic_gpu"), steps("reference")
    for _ in range(3):
        np.testing.assert_array_equal(ours(*arrays), theirs(*arrays))


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 4, reason="needs four Hopper GPUs in one process"
)
def test_on_pairs_of_four_gpus():
    run = on_mesh(functools.partial(remote_all_to_all, implementation="mosaic_gpu"), 4, 2)
    *arrays, expected = case(2, 2, 2, 50, (512,), jnp.bfloat16, "skewed")
    np.testing.assert_array_equal(run(*arrays), expected)

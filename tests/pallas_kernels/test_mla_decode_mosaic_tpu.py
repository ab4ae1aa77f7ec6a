"""`mla_decode` on TPU: the kernel interpreted on CPU, compiled for TPUs where libtpu is installed."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_mla_decode import float64
from test_mla_decode_mosaic_gpu import contiguous

from pallas_kernels import UnsupportedError, implementations, mla_decode, target_platform
from pallas_kernels.mla_decode import mosaic_tpu
from pallas_kernels.mla_decode.shapes import Shape

RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SMALL = Shape(3, (0, 129, 300), 4, rank=128, rope=32)  # Off the block, and nothing to see.


@pytest.mark.parametrize(
    "change, interpret",
    [
        ({}, RACES),  # One case where races would be found, and memory read before it is written.
        ({"lengths": (300, 1, 2), "s_q": 3, "cache": "int8"}, True),
        ({"page": 32, "s_q": 2, "cache": "float8_e4m3fn"}, True),
    ],
    ids=str,
)
def test_interpreted(change, interpret):
    """Output and log-sum-exp from float32 queries, blocks of 128 entries."""
    shape = dataclasses.replace(SMALL, **change)
    (q, c_kv, k_rope, lengths), options = shape.operands()
    q, *cache = (
        x if shape.quantised and i else x.astype(jnp.float32) for i, x in enumerate((q, c_kv, k_rope))
    )
    if "page_table" in options:
        used = -(-lengths // shape.page)
        pages = jnp.arange(options["page_table"].shape[1])
        options["page_table"] = jnp.where(pages < used[:, None], options["page_table"], 10**6)  # Not read.
    scale, table = options.pop("scale"), options.get("page_table")
    factors = options.get("c_kv_scale"), options.get("k_rope_scale")
    got = mosaic_tpu.attention(
        q, *cache, lengths, table, *factors, scale=scale, block=128, interpret=interpret
    )
    if table is not None:
        options["page_table"] = jnp.where(table < 10**6, table, 0)
    meant = (contiguous(x, factor, options) for x, factor in zip(cache, factors, strict=True))
    for mine, want in zip(got, float64(q, lengths, *meant, scale), strict=True):
        # float32 rounding of sums of some 300 terms of size 1.
        np.testing.assert_allclose(mine, want, rtol=0, atol=1e-5)
    if interpret is RACES:
        assert not interpret_pallas_call.races.races_found


def compiled(shape, topology, monkeypatch, implementation="auto", **options):
    """The op for a TPU, ahead of time."""
    libtpu = pytest.importorskip("libtpu", reason="needs libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Test workers side by side.
    monkeypatch.setenv("TPU_LIBRARY_PATH", os.environ.get("TPU_LIBRARY_PATH", libtpu.get_library_path()))
    monkeypatch.setattr(implementations, "on_one_device", lambda: True)
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    arrays, named = jax.eval_shape(
        lambda: (shape.operands()[0], {k: v for k, v in shape.operands()[1].items() if k != "scale"})
    )
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays, named = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (arrays, named)
    )

    def f(arrays, named):
        return mla_decode(*arrays, scale=0.1, implementation=implementation, **named)

    with target_platform("tpu"):
        lowered = jax.jit(f).trace(arrays, named).lower(lowering_platforms=("tpu",))
        return lowered.compile(**options)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 4096, 16),
        Shape(4, 1024, 16, s_q=2, page=64, cache="float8_e4m3fn"),
        Shape(4, 1000, 128, cache="int8"),
    ],
    ids=str,
)
def test_compiles_for_tpu(shape, topology, monkeypatch):
    """Ahead of time, by TPU's own compiler: "auto" is one kernel, in 4 MiB of VMEM."""
    options = {"xla_tpu_scoped_vmem_limit_kib": str(4 << 10)}
    text = compiled(shape, topology, monkeypatch, compiler_options=options).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.parametrize(
    "shape, message",
    [
        (Shape(1, 128, 16, rank=192), "latents of width 192; it takes multiples of 128"),
        (Shape(1, 128, 16, page=16), "page size 16; it takes multiples of 32"),
    ],
)
def test_refusals_name_the_constraint(shape, message):
    def call():
        arrays, options = shape.operands()
        return mla_decode(*arrays, implementation="mosaic_tpu", **options)

    with target_platform("tpu"), pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(call)


def test_not_on_cpu():
    arrays, options = Shape(1, 8, 16).operands()
    with pytest.raises(UnsupportedError, match="it runs on TPU, not on cpu"):
        mla_decode(*arrays, implementation="mosaic_tpu", **options)

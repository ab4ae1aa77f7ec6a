"""`mla_attention` on TPU: the kernels interpreted on CPU, compiled for TPUs where libtpu is installed."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_mla_attention import float64, make

from pallas_kernels import UnsupportedError, mla_attention, target_platform
from pallas_kernels.mla_attention import mosaic_tpu

RACES = pltpu.InterpretParams(detect_races=True)


@pytest.mark.parametrize(
    "name, interpret",
    [("packed", True), ("full", True), ("gqa", RACES), ("chunked prefill", True)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_interpreted(name, interpret):
    """Output, log-sum-exp and gradients, from float32 operands; one case where races would be found."""
    operands, options, (d_out, _) = make(name)
    segments = options.get("segment_ids")
    scale = options["scale"] or operands[0].shape[-1] ** -0.5
    options["kv_segment_ids"] = segments

    def f(*operands):
        static = {"scale": scale, "causal": options["causal"], "interpret": interpret, "block": 128}
        return mosaic_tpu.attention(*operands, segments, segments, **static)

    out, pullback, lse = jax.vjp(f, *operands, options["k_rope"], has_aux=True)
    got = out, lse, *pullback(d_out)
    exact = float64(operands, options, (d_out, np.zeros(lse.shape)))
    for mine, want in zip(got, exact, strict=True):
        if want is not None:
            # float32 rounding of sums of some 40 terms of size 1.
            np.testing.assert_allclose(mine, want, rtol=0, atol=5e-6)
    if interpret is RACES:
        assert not interpret_pallas_call.races.races_found


def operands(q_len=256, kv_len=256, heads=4, dtype=jnp.bfloat16, sharding=None):
    shapes = (1, q_len, heads, 192), (1, kv_len, heads, 128), (1, kv_len, heads, 128), (1, kv_len, 64)
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]


def f(q, k, v, k_rope, segments=None, implementation="mosaic_tpu", **options):
    named = {"k_rope": k_rope, "segment_ids": segments, "implementation": implementation, **options}
    return mla_attention(q, k, v, **named).astype(jnp.float32).sum()


def test_lowers_for_tpu():
    """Forward, dQ, and dK and dV; what would compute the log-sum-exp, which nobody reads, is dropped."""
    with target_platform("tpu"):
        traced = jax.jit(jax.grad(f, (0, 1, 2, 3))).trace(*operands())
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": jnp.float16}, "it takes all bfloat16 or float32"),
        ({"q_len": 257}, "some queries see nothing"),
    ],
)
def test_refusals_name_the_constraint(change, message):
    with target_platform("tpu"), pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(f, *operands(**change))


def test_not_on_cpu():
    with pytest.raises(UnsupportedError, match="it runs on TPU, not on cpu"):
        jax.eval_shape(f, *operands())


def test_gradient_of_the_log_sum_exp_is_refused():
    def lse(q, k, v, k_rope):
        options = {"k_rope": k_rope, "return_lse": True, "implementation": "mosaic_tpu"}
        return mla_attention(q, k, v, **options)[1].sum()

    with (
        target_platform("tpu"),
        pytest.raises(UnsupportedError, match="'mosaic_tpu' has no gradient through"),
    ):
        jax.eval_shape(jax.grad(lse), *operands())


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "packed"])
def test_compiles_for_tpu(topology, documents, monkeypatch):
    """Ahead of time, by TPU's own compiler: three kernels, in 4 MiB of VMEM each."""
    libtpu = pytest.importorskip("libtpu", reason="needs libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Test workers side by side.
    monkeypatch.setenv("TPU_LIBRARY_PATH", os.environ.get("TPU_LIBRARY_PATH", libtpu.get_library_path()))
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    shapes = operands(1024, 1024, 16, sharding=jax.sharding.SingleDeviceSharding(device))
    if documents:
        shapes.append(jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=shapes[0].sharding))
    with target_platform("tpu"):
        traced = jax.jit(jax.grad(functools.partial(f, implementation="mosaic_tpu"), (0, 1, 2, 3))).trace(
            *shapes
        )
        options = {"xla_tpu_scoped_vmem_limit_kib": str(4 << 10)}
        compiled = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=options)
    assert compiled.as_text().count("tpu_custom_call") == 3

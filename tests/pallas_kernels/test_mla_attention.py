"""`mla_attention` against the equations in float64 numpy, for every implementation that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, mla_attention, target_platform
from pallas_kernels.mla_attention import chunked, cudnn, strips

# name: batch, q_len, kv_len, heads, kv_heads, d_qk, d_v, d_rope, causal, segments, scale of the logits
CASES = {
    "mla": (2, 33, 33, 4, 4, 24, 16, 8, True, False, None),
    "gqa": (1, 20, 20, 6, 2, 16, 16, 0, True, False, 0.3),
    "mqa": (1, 9, 9, 4, 1, 8, 8, 0, True, False, None),
    "full": (1, 17, 31, 2, 2, 16, 8, 0, False, False, None),
    "one token": (2, 1, 1, 2, 2, 16, 8, 8, True, False, None),
    "chunked prefill": (1, 7, 40, 2, 2, 24, 16, 8, True, False, None),
    "queries that see nothing": (1, 12, 5, 2, 2, 16, 8, 0, True, False, None),
    "packed": (2, 45, 45, 2, 2, 24, 16, 8, True, True, None),
    "packed, not causal": (2, 13, 29, 2, 2, 16, 16, 0, False, True, None),
    "large logits": (1, 32, 32, 2, 2, 16, 16, 0, True, False, 25.0),
}


def make(name, dtype=np.float32, seed=0):
    """The arguments of a case: positional, keyword, and cotangents for the output and the log-sum-exp."""
    batch, q_len, kv_len, heads, kv_heads, d_qk, d_v, d_rope, causal, segments, scale = CASES[name]
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k = normal(batch, q_len, heads, d_qk), normal(batch, kv_len, kv_heads, d_qk - d_rope)
    v = normal(batch, kv_len, kv_heads, d_v)
    options = {"causal": causal, "scale": scale, "k_rope": normal(batch, kv_len, d_rope) if d_rope else None}
    if segments:
        ids = np.sort(rng.integers(0, 4, (batch, max(q_len, kv_len))))
        ids[0, -3:] = 9  # A document that only the last rows hold.
        options["segment_ids"] = jnp.asarray(ids[:, :q_len], jnp.int32)
        options["kv_segment_ids"] = jnp.asarray(ids[:, -kv_len:], jnp.int32)
    d_lse = normal(batch, heads, q_len).astype(jnp.float32)
    return (q, k, v), options, (normal(batch, q_len, heads, d_v), d_lse)


def float64(operands, options, cotangents):
    """Output, log-sum-exp, and the gradients of q, k, v, k_rope, from the equations."""
    q, k, v = (np.asarray(array, np.float64) for array in operands)
    d_out, d_lse = (np.asarray(array, np.float64) for array in cotangents)
    group = q.shape[2] // k.shape[2]
    rope = options["k_rope"]
    d_k = k.shape[-1]
    if rope is not None:
        rope = np.asarray(rope, np.float64)
        k = np.concatenate([k, np.broadcast_to(rope[:, :, None], (*k.shape[:3], rope.shape[-1]))], -1)
    wide_k, wide_v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = options["scale"] or q.shape[-1] ** -0.5
    logits = np.einsum("bshd,bthd->bhst", q, wide_k) * scale
    q_len, kv_len = q.shape[1], k.shape[1]
    visible = np.ones((1, 1, q_len, kv_len), bool)
    if options["causal"]:
        visible = visible & (np.arange(kv_len) <= np.arange(q_len)[:, None] + kv_len - q_len)
    if options.get("segment_ids") is not None:
        mine, theirs = np.asarray(options["segment_ids"]), np.asarray(options["kv_segment_ids"])
        visible = visible & (mine[:, None, :, None] == theirs[:, None, None, :])
    weights = np.where(visible, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + logits.max(-1, keepdims=True))[..., 0]
    out = np.einsum("bhst,bthd->bshd", p, wide_v)

    dp = np.einsum("bshd,bthd->bhst", d_out, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[..., None]) * scale
    dq = np.einsum("bhst,bthd->bshd", ds, wide_k)

    def per_kv_head(wide):
        return wide.reshape(*wide.shape[:2], -1, group, wide.shape[-1]).sum(3)

    dk = per_kv_head(np.einsum("bhst,bshd->bthd", ds, q))
    dv = per_kv_head(np.einsum("bhst,bshd->bthd", p, d_out))
    return out, lse, dq, dk[..., :d_k], dv, None if rope is None else dk[..., d_k:].sum(2)


def run(operands, options, cotangents, **named):
    """What `float64` returns, from `mla_attention`."""
    options = dict(options, **named)
    k_rope = options.pop("k_rope")

    def f(q, k, v, k_rope):
        return mla_attention(q, k, v, k_rope=k_rope, return_lse=True, **options)

    @jax.jit
    def both(operands, k_rope, cotangents):
        (out, lse), pullback = jax.vjp(f, *operands, k_rope)
        # A query that sees nothing has a constant log-sum-exp of -inf.
        return (out, lse, *pullback((cotangents[0], jnp.where(jnp.isfinite(lse), cotangents[1], 0))))

    return both(operands, k_rope, cotangents)


@pytest.fixture(params=["reference", "strips", "chunked"])
def implementation(request, monkeypatch):
    if request.param == "chunked":  # In small blocks, so that small cases take several.
        monkeypatch.setattr(chunked, "attention", functools.partial(chunked.attention, block=8))
    if request.param == "strips":
        monkeypatch.setattr(strips, "attention", functools.partial(strips.attention, rows=8))
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name, implementation):
    case = make(name)
    expected = float64(*case)
    got = run(*case, implementation=implementation)
    for label, mine, oracle in zip(("out", "lse", "dq", "dk", "dv", "dk_rope"), got, expected, strict=True):
        if oracle is None:
            assert mine is None
            continue
        # Float32 sums of at most 45 terms; large logits, up to about 600, move exp by 600 * 2^-24 = 4e-5.
        tolerance = 2e-3 if name == "large logits" else 2e-5
        assert mine.shape == oracle.shape, label
        np.testing.assert_allclose(mine, oracle, rtol=tolerance, atol=tolerance * 4, err_msg=label)


def test_queries_that_see_nothing_return_zero(implementation):
    case = make("queries that see nothing")
    out, lse, dq, *_ = run(*case, implementation=implementation)
    assert np.all(np.asarray(out[:, :7]) == 0) and np.all(np.asarray(lse[..., :7]) == -np.inf)
    assert np.all(np.asarray(dq[:, :7]) == 0)
    assert np.all(np.isfinite(lse[..., 7:]))


def test_bfloat16_rounds_once(implementation):
    """In bfloat16 the error stays within a few roundings of operands and probabilities (2^-9 each)."""
    case = make("mla", jnp.bfloat16)
    expected = float64(*case)
    for mine, oracle in zip(run(*case, implementation=implementation), expected, strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float64) - oracle) / np.linalg.norm(oracle)
        assert error < 3 * 2**-9


def test_no_keys(implementation):
    q, k, v = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 0, 2, 8)), jnp.ones((1, 0, 2, 4))
    out, lse = mla_attention(q, k, v, causal=False, return_lse=True, implementation=implementation)
    assert out.shape == (1, 5, 2, 4) and np.all(np.asarray(out) == 0)
    assert lse.shape == (1, 2, 5) and np.all(np.asarray(lse) == -np.inf)


def test_chunked_memory_is_linear_in_the_length():
    """Temporary memory of forward and backward at twice the length is at most about twice as large."""

    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        f = jax.grad(lambda q, k, v: mla_attention(q, k, v, implementation="chunked").sum(), (0, 1, 2))
        return jax.jit(f).trace(q, q, q).lower().compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8192), temporaries(32768)
    # Scores of one block pair (2 MiB) do not grow; a score matrix would, by 16.
    assert large < 4.2 * small


@pytest.mark.parametrize("implementation", ["chunked", "strips"])
def test_under_shard_map(implementation):
    """Loop carries keep the manual axes of the operands, both ways, and no constant is an input."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    (q, k, v), options, _ = make("mla")

    def loss(q, k, v, k_rope):
        return (mla_attention(q, k, v, k_rope=k_rope, implementation=implementation) ** 2).sum((1, 2, 3))

    # With the check of axes where loops must pass it, and without it, as the model calls attention.
    checked = implementation == "chunked"
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked)
    arguments = (q, k, v, options["k_rope"])
    got = jax.jit(jax.grad(lambda *a: mapped(*a).sum(), range(4)))(*arguments)
    plain = jax.jit(jax.grad(lambda *a: loss(*a).sum(), range(4)))
    # Each row alone, as each device has it: the same products of the same shapes. Both rows at once would sum
    # in another order, and entries that cancel to 0, as row 0 of dq, are rounding alone.
    alone = [plain(*(x[row : row + 1] for x in arguments)) for row in range(2)]
    for mine, *rows in zip(got, *alone, strict=True):
        np.testing.assert_allclose(mine, jnp.concatenate(rows), rtol=1e-6, atol=1e-6)


def test_auto_on_cpu_never_keeps_the_whole_square():
    """Autodiff through the reference's softmax once took longer than the rest of a training step."""

    def jaxpr(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        return str(jax.make_jaxpr(lambda q: mla_attention(q, q, q))(q))

    assert "f32[1,1,1,128,128]" in jaxpr(256) and "256,256]" not in jaxpr(256)  # Strips.
    assert "512,512]" in jaxpr(4096) and "4096,4096]" not in jaxpr(4096)  # Chunks.


def test_chunked_at_its_own_block_size():
    """Several blocks of the default size, the last one partial."""
    rng = np.random.default_rng(1)
    length = 2 * chunked.BLOCK + 3
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, width)), jnp.float32) for width in (8, 8, 4))
    got, expected = (mla_attention(q, k, v, implementation=name) for name in ("chunked", "reference"))
    # Float32 sums of 1,027 terms of about 1e-3.
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


class TestCudnn:
    """What can be known of the cuDNN path without a GPU."""

    def lower(self, monkeypatch, f, *arguments):
        from jax._src.cudnn import fused_attention_stablehlo as fused

        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)
        monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
        cudnn._missing.cache_clear()
        with target_platform("gpu"):
            lowered = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        cudnn._missing.cache_clear()
        return lowered

    def operands(self, dtype=jnp.bfloat16):
        return [jax.ShapeDtypeStruct((2, 64, 4, width), dtype) for width in (192, 128, 128)] + [
            jax.ShapeDtypeStruct((2, 64, 64), dtype)
        ]

    def test_lowers_to_one_call_each_way(self, monkeypatch):
        def loss(q, k, v, k_rope):
            return mla_attention(q, k, v, k_rope=k_rope, implementation="cudnn").astype(jnp.float32).sum()

        text = self.lower(monkeypatch, jax.grad(loss, (0, 1, 2, 3)), *self.operands())
        assert text.count("@__cudnn$fmhaSoftmax(") == 1 and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
        assert "CAUSAL" in text

    def test_auto_takes_it_on_gpu(self, monkeypatch):
        text = self.lower(monkeypatch, lambda q, k, v, r: mla_attention(q, k, v, k_rope=r), *self.operands())
        assert "__cudnn$fmhaSoftmax" in text

    def test_gradient_through_the_log_sum_exp_is_refused(self, monkeypatch):
        def loss(q, k, v, k_rope):
            return mla_attention(q, k, v, k_rope=k_rope, return_lse=True, implementation="cudnn")[1].sum()

        with pytest.raises(UnsupportedError, match="no gradient through the log-sum-exp"):
            self.lower(monkeypatch, jax.grad(loss), *self.operands())

    def test_refusals_name_the_constraint(self, monkeypatch):
        q, k, v, k_rope = self.operands()
        ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        short = jax.ShapeDtypeStruct((2, 32, 4, 192), jnp.bfloat16)
        wide = jax.ShapeDtypeStruct((2, 64, 4, 256), jnp.bfloat16)
        refused = {
            "segment ids": ((q, k, v), {"k_rope": k_rope, "segment_ids": ids}),
            "q_len 32 must equal kv_len 64": ((short, k, v), {"k_rope": k_rope}),
            "widths 256 and 256": ((wide, wide, wide), {}),
            "float32": (self.operands(jnp.float32)[:3], {"k_rope": self.operands(jnp.float32)[3]}),
        }
        for message, (operands, options) in refused.items():
            with pytest.raises(UnsupportedError, match=message):
                self.lower(
                    monkeypatch,
                    lambda *a, names=tuple(options): mla_attention(
                        *a[:3], implementation="cudnn", **dict(zip(names, a[3:], strict=True))
                    ),
                    *operands,
                    *options.values(),
                )

    def test_not_on_cpu(self):
        q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
        with pytest.raises(UnsupportedError, match="cuDNN runs on GPUs"):
            mla_attention(q, q, q, implementation="cudnn")


@pytest.mark.parametrize("kept, again", [(("attention_out", "attention_lse"), 0), (("attention_out",), 1)])
def test_with_output_and_log_sum_exp_kept_the_backward_pass_does_not_attend_again(kept, again):
    (q, k, v), _, _ = make("gqa")

    def f(q, k, v):
        return mla_attention(jnp.sin(q), k, v, implementation="chunked").sum()

    def loops(f):
        return str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v)).count("while[")

    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    one_forward = loops(lambda *a: mla_attention(*a, implementation="chunked").sum()) // 2
    assert one_forward > 0
    assert loops(jax.checkpoint(f, policy=policy)) == loops(f) + again * one_forward

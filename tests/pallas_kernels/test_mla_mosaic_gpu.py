"""The Hopper kernels of `mla_attention`: block ranges and lowering here, numbers on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mla_attention import float64

from pallas_kernels import UnsupportedError, implementations, mla_attention, target_platform
from pallas_kernels.mla_attention import chunked, cudnn, mosaic_gpu
from pallas_kernels.mla_attention import mosaic_gpu_call as calls
from pallas_kernels.mla_attention.shapes import BENCHMARK, CORRECTNESS, Shape

lowers = pytest.mark.skipif(jax.__version_info__ < mosaic_gpu.MINIMUM_JAX, reason="needs JAX 0.11.2")


def make_call(q_len, kv_len, causal, batch=1, heads=2, kv_heads=2):
    return calls.Call(batch, heads, kv_heads, q_len, kv_len, causal, 0.1, 192, 192, 128, 32)


def visible_pairs(call, q_segments=None, kv_segments=None):
    """`[batch, q_len, kv_len]`, by definition."""
    visible = np.ones((1, call.q_len, call.kv_len), bool)
    if call.causal:
        rows = np.arange(call.q_len)[:, None] + call.kv_len - call.q_len
        visible = visible & (np.arange(call.kv_len) <= rows)
    if q_segments is not None:
        visible = visible & (q_segments[:, :, None] == kv_segments[:, None, :])
    return visible


def check_range(visible, blocks, size, count):
    """That no visible column lies outside the range, and all columns of the wholly visible blocks are."""
    first, whole_first, whole_last, last = (int(block) for block in blocks)
    assert 0 <= first < last <= count
    columns = np.flatnonzero(visible.any(0))
    assert not len(columns) or (first * size <= columns[0] and columns[-1] < last * size)
    # The kernels clamp to what they visit.
    for block in range(max(first, whole_first), min(whole_last, last)):
        assert (block + 1) * size <= visible.shape[1]
        assert visible[:, block * size : (block + 1) * size].all()


LENGTHS = [(1, 1), (128, 128), (129, 129), (700, 700), (300, 1111), (1111, 300), (64, 640), (640, 333)]


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_ranges_without_segments_cover_what_is_visible(q_len, kv_len, causal):
    call = make_call(q_len, kv_len, causal)
    visible = visible_pairs(call)[0]
    for tile in range(call.q_tiles):
        rows = visible[tile * 128 : (tile + 1) * 128]
        for size in (64, 128):
            check_range(rows, call.key_blocks(None, 0, tile, size), size, -(-kv_len // size))
    written = np.zeros((call.kv_tiles, call.q_tiles), bool)
    for tile in range(call.kv_tiles):
        keys = visible[:, tile * 128 : (tile + 1) * 128].T
        blocks = [int(block) for block in call.query_blocks(None, 0, tile)]
        written[tile, blocks[0] // 2 : -(-blocks[3] // 2)] = True
        if len(keys) < 128:  # A partial tile is masked everywhere.
            assert blocks[1] >= blocks[2]
        padded = np.pad(keys, ((0, 0), (0, -keys.shape[1] % 128)), mode="edge")  # Absent queries may count.
        check_range(padded, blocks, 64, 2 * call.q_tiles)
    for tile in range(call.q_tiles):
        first, _, _, last = call.key_blocks(None, 0, tile, 64)
        # dS is read in these blocks, so it must have been written.
        assert written[[int(block) // 2 for block in range(first, last)], tile].all()


@pytest.mark.parametrize("kind", ["packed", "any order"])
@pytest.mark.parametrize("causal", [True, False])
def test_ranges_with_segments_cover_what_is_visible(kind, causal):
    rng = np.random.default_rng(0)
    call = make_call(900, 1000, causal, batch=3)
    ids = rng.integers(0, 7, (3, 1000))
    ids = np.sort(ids) if kind == "packed" else np.repeat(ids[:, :20], 50, 1)
    q_ids, kv_ids = ids[:, 100:], ids
    visible = visible_pairs(call, q_ids, kv_ids)
    for size in (64, 128):
        some, whole = calls.visible_blocks(call, jnp.asarray(q_ids), jnp.asarray(kv_ids), size)
        by_query = calls.ranges(some, whole)
        for row in range(3):
            for tile in range(call.q_tiles):
                rows = visible[row, tile * 128 : (tile + 1) * 128]
                check_range(rows, by_query[row, tile], size, some.shape[-1])
    by_key = calls.ranges(calls.between(some).swapaxes(1, 2), whole.swapaxes(1, 2))
    for row in range(3):
        for tile in range(call.kv_tiles):
            keys = visible[row, :, tile * 128 : (tile + 1) * 128].T
            padded = np.pad(keys, ((0, 0), (0, -keys.shape[1] % 128)), mode="edge")
            check_range(padded, by_key[row, tile], 128, call.q_tiles)
            # dS is read wherever a query tile's range passes: the key tile's must have passed there too.
            readers = [t for t in range(call.q_tiles) if by_query[row, t, 0] <= tile < by_query[row, t, 3]]
            assert all(by_key[row, tile, 0] <= t < by_key[row, tile, 3] for t in readers)


def test_packing_skips_other_documents():
    """A tile inside one of 8 documents visits that document's blocks only."""
    ids = jnp.repeat(jnp.arange(8), 1024)[None]
    call = make_call(8192, 8192, True)
    visited = calls.ranges(*calls.visible_blocks(call, ids, ids, 128))
    causal = sum(int(call.key_blocks(None, 0, tile, 128)[3]) for tile in range(call.q_tiles))
    assert int((visited[..., 3] - visited[..., 0]).sum()) == 8 * sum(range(1, 9))
    assert causal == sum(range(1, 65))


@pytest.mark.parametrize("ascending", [True, False])
def test_programs_cover_every_tile_once(ascending):
    call = make_call(1000, 1000, True, batch=3, heads=6)
    work = {tuple(map(int, call.locate(i, 6, 8, 1000, ascending))) for i in range(3 * 6 * 8)}
    assert work == {(row, head, tile) for row in range(3) for head in range(6) for tile in range(8)}


@pytest.mark.parametrize("shape", [*BENCHMARK, Shape(1, 300, 2), Shape(2, 4096, 3, causal=False)], ids=str)
def test_programs_are_dealt_equal_work(shape):
    """Every tile once; the most loaded of 132 programs is within a tile of the mean."""
    call = make_call(shape.length, shape.length, shape.causal, shape.batch, shape.heads, shape.heads)
    tiles = call.batch * call.heads * call.q_tiles
    programs = min(132, tiles)
    table = calls.deal(call, programs, 128, False)
    hands = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(hands)) == list(range(tiles))
    *_, q_tile = call.locate(np.arange(tiles), call.heads, call.q_tiles, shape.length, not shape.causal)
    blocks = q_tile + 1 if shape.causal else np.full(tiles, call.q_tiles)
    load = [blocks[hand].sum() for hand in hands]
    assert max(load) - np.mean(load) <= call.q_tiles * (0.25 if tiles > 1000 and shape.causal else 1)


@pytest.mark.parametrize("documents, even", [(1, False), (8, True)])
def test_one_long_document_is_dealt_as_causal(documents, even):
    call = make_call(4096, 4096, True, heads=16, kv_heads=16)
    ids = jnp.arange(4096)[None] * documents // 4096
    ranges = calls.ranges(*calls.visible_blocks(call, ids, ids, 128))
    got = np.asarray(calls.deal_by_ranges(call, 132, 128, ranges))
    want = calls.deal(call, 132, 128, even)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert not got[:, want.shape[1] :].any()


def test_very_many_tiles_are_dealt_in_turn():
    call = make_call(128, 128, True, batch=4096, heads=64, kv_heads=64)
    table = calls.deal(call, 132, 128, False)
    assert sorted(np.concatenate([row[1 : 1 + row[0]] for row in table])) == list(range(4096 * 64))


def trace(shape, dtype=jnp.bfloat16, gradient=False, **options):
    """Shapes of the operands, and the function of them that calls the kernels."""
    (q, k, v), more = jax.eval_shape(lambda: (shape.operands()[0], None))[0], {}
    kv_length = shape.kv_length or shape.length
    if shape.d_rope:
        more["k_rope"] = jax.ShapeDtypeStruct((shape.batch, kv_length, shape.d_rope), dtype)
    if shape.documents:
        more["segment_ids"] = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
        more["kv_segment_ids"] = jax.ShapeDtypeStruct((shape.batch, kv_length), jnp.int32)
    operands = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (q, k, v)]

    def f(q, k, v, more):
        options_ = {"implementation": "mosaic_gpu", "causal": shape.causal, **options}
        return mla_attention(q, k, v, **more, **options_).astype(jnp.float32).sum()

    return jax.grad(f, (0, 1, 2)) if gradient else f, (*operands, more)


def lower(f, operands):
    with target_platform("gpu"):
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@lowers
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 777, 4, kv_heads=2),
        Shape(1, 300, 2, kv_length=1111, d_rope=64),
        Shape(2, 200, 2, d_rope=64, documents=3),
        Shape(1, 130, 2, d_qk=64, d_v=64, causal=False),
    ],
    ids=str,
)
def test_lowers_for_hopper(shape):
    """One kernel forward and two backward, layouts and shared memory checked by the compiler's front end."""
    assert lower(*trace(shape, gradient=True)).count("@mosaic_gpu_v2(") == 3


@lowers
def test_lowers_with_scores_recomputed_when_they_take_too_much_memory(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "attention", functools.partial(mosaic_gpu.attention, workspace=0))
    assert lower(*trace(Shape(1, 256, 2, d_rope=64), gradient=True)).count("@mosaic_gpu_v2(") == 3


@lowers
@pytest.mark.parametrize("heads", [2, 16])
def test_lowers_under_shard_map(heads, monkeypatch):
    """Results vary over the mesh axes that the operands do, also where the backward kernels run in a loop."""
    one_head = 2 * 2 * 2 * 128**2  # Bytes of dS: two tiles of queries, two of keys.
    attention = functools.partial(mosaic_gpu.attention, workspace=2 * one_head)
    monkeypatch.setattr(mosaic_gpu, "attention", attention)
    monkeypatch.setattr(mosaic_gpu, "_UNROLLED", 4)
    f, operands = trace(Shape(2, 256, heads, d_rope=64, documents=2), gradient=True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    assert lower(mapped, operands).count("@mosaic_gpu_v2(") == 3


@lowers
@pytest.mark.parametrize(
    "devices, documents, chosen",
    [(1, 2, "mosaic_gpu"), (8, 2, "chunked"), (1, 0, "mosaic_gpu"), (8, 0, "cudnn")],
)
def test_auto_takes_it_on_one_device(devices, documents, chosen, monkeypatch):
    """On several devices the compiler would give our kernel the whole batch; cuDNN takes no segment ids."""
    taken = []
    monkeypatch.setattr(implementations, "on_one_device", lambda: devices == 1)
    monkeypatch.setattr(cudnn, "_missing", lambda: None)
    monkeypatch.setattr(cudnn, "attention", chunked.attention)  # The choice is tested, here without cuDNN.
    monkeypatch.setattr(implementations, "_announce", lambda op, where, name, why: taken.append(name))
    f, operands = trace(Shape(1, 8192, 128, documents=documents), implementation="auto")
    with target_platform("gpu"):
        jax.eval_shape(f, *operands)
    assert taken == [chosen]


@lowers
@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        (Shape(1, 128, 2), jnp.float32, "it takes bfloat16"),
        (Shape(1, 128, 2, d_qk=96, d_v=96), jnp.bfloat16, "widths 96 and 96"),
        (Shape(1, 128, 2, d_qk=256, d_v=256), jnp.bfloat16, "widths 256 and 256"),
    ],
)
def test_refusals_name_the_constraint(shape, dtype, message):
    f, operands = trace(shape, dtype)
    with pytest.raises(UnsupportedError, match=message):
        lower(f, operands)


def plain_keys_values(operands, *, call, heads, with_scores):
    """What `mosaic_gpu_backward.keys_values` returns, in plain JAX, for causal calls."""
    (first, count), group, f32 = heads, call.group, jnp.float32
    queries, keys = slice(first * group, (first + count) * group), slice(first, first + count)
    q, d_out = (x[:, : call.q_len, queries].astype(f32) for x in (operands.q, operands.d_out))
    k, v = (jnp.repeat(x[:, : call.kv_len, keys].astype(f32), group, 2) for x in (operands.k, operands.v))
    rope = operands.k_rope[:, : call.kv_len, None].astype(f32)
    k = jnp.concatenate([k, jnp.broadcast_to(rope, (*k.shape[:3], call.d_rope))], -1)
    shift, delta = (x[:, queries, : call.q_len, None] for x in (operands.shift, operands.delta))
    hidden = jnp.arange(call.kv_len) > jnp.arange(call.q_len)[:, None] + call.offset
    p = jnp.exp(call.scale * (jnp.einsum("bshd,bthd->bhst", q, k) + shift))
    p = jnp.where(hidden, 0, p)  # In units of UNIT.
    scores = p * (jnp.einsum("bshd,bthd->bhst", d_out, v) + delta)

    def per_key_head(x):
        return calls.UNIT * x.reshape(*x.shape[:2], count, group, -1).sum(3)

    dk = per_key_head(jnp.einsum("bhst,bshd->bthd", scores, q)) * call.scale
    dv = per_key_head(jnp.einsum("bhst,bshd->bthd", p, d_out))
    return dk[..., : call.d_k], dv, dk[..., call.d_k :], scores


def plain_from_scores(scores, k, k_rope, ranges, *, call, heads):
    first, count = heads
    k = jnp.repeat(k[:, : call.kv_len, first : first + count], call.group, 2)
    shared = jnp.broadcast_to(k_rope[:, : call.kv_len, None], (*k.shape[:3], call.d_rope))
    k = jnp.concatenate([k, shared], -1).astype(jnp.float32)
    return jnp.einsum("bhst,bthd->bshd", scores, k) * (call.scale * calls.UNIT)


@lowers
@pytest.mark.parametrize("unrolled", [1, 8], ids="up to {} parts unrolled".format)
@pytest.mark.parametrize("together", [1, 2], ids="{} heads together".format)
def test_some_heads_at_a_time(unrolled, together, monkeypatch):
    """The backward pass around its kernels, which plain JAX stands in for: same gradients however cut."""
    from pallas_kernels.mla_attention import mosaic_gpu_backward, mosaic_gpu_queries

    monkeypatch.setattr(mosaic_gpu_backward, "keys_values", plain_keys_values)
    monkeypatch.setattr(mosaic_gpu_queries, "from_scores", plain_from_scores)
    monkeypatch.setattr(mosaic_gpu, "_UNROLLED", unrolled)
    shapes = (2, 21, 8, 96), (2, 30, 4, 64), (2, 30, 4, 64), (2, 30, 32), (2, 21, 8, 64)
    q, k, v, k_rope, d_out = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    absent, scale = (None, None), 0.1
    f = functools.partial(chunked.attention, scale=scale, causal=True)
    (out, lse), pullback = jax.vjp(lambda *a: f(*a, *absent), q, k, v, k_rope)
    d_lse = jnp.cos(lse)
    saved = q, k, v, k_rope, *absent, out, lse
    workspace = together * 2 * 2 * 2 * 128**2  # Bytes, batch, group; one tile of queries, one of keys.
    got = mosaic_gpu._backward(scale, True, None, workspace, saved, (d_out, d_lse))
    for mine, want in zip(got, pullback((d_out, d_lse)), strict=False):
        np.testing.assert_allclose(mine, want, rtol=0, atol=2e-5)  # Sums of 30 float32 products of size 1.


def test_not_on_cpu():
    q = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="older than 0.11.2|Hopper GPUs"):
        mla_attention(q, q, q, implementation="mosaic_gpu")


def run(operands, options, d_out, implementation, times):
    """Output, log-sum-exp and gradients, so many times."""

    def f(q, k, v, k_rope):
        more = {name: x for name, x in options.items() if name != "k_rope"}
        if implementation == "chunked" and k_rope is not None:
            # As for cuDNN: a copy for every head, and so its gradient rounded to bf16 head by head, as ours.
            shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
            k, k_rope = jnp.concatenate([k, shared], -1), None
        return mla_attention(q, k, v, k_rope=k_rope, **more, return_lse=True, implementation=implementation)

    @jax.jit
    def both(operands, k_rope, d_out):
        (out, lse), pullback = jax.vjp(f, *operands, k_rope)
        d_lse = jnp.where(jnp.isfinite(lse), 0.5, 0.0)
        return (out, lse, *pullback((d_out, d_lse)))

    for i in range(times):
        # Poison for memory not written, and a different one each time.
        jnp.full((64 << 20,), (jnp.nan, 1e30)[i], jnp.float32).block_until_ready()
        yield both(operands, options.get("k_rope"), d_out)


CASES = [*((shape, 1.0) for shape in CORRECTNESS), (Shape(1, 1000, 2), 20.0)]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("workspace", [mosaic_gpu.WORKSPACE, 0], ids=["dS written", "dS recomputed"])
@pytest.mark.parametrize("shape, factor", CASES, ids=lambda x: str(x))
def test_as_exact_as_plain_jax_and_repeatable(shape, factor, workspace, monkeypatch):
    attention = functools.partial(mosaic_gpu.attention, workspace=workspace)
    monkeypatch.setattr(mosaic_gpu, "attention", attention)
    operands, options = shape.operands(factor=factor)
    d_out = jax.random.normal(jax.random.key(9), (*operands[0].shape[:3], shape.d_v), jnp.bfloat16)
    first, second = run(operands, options, d_out, "mosaic_gpu", 2)
    (peer,) = run(operands, options, d_out, "chunked", 1)
    d_lse = np.where(np.isfinite(first[1]), 0.5, 0.0)
    exact = float64(operands, {"scale": None, "k_rope": None, **options}, (d_out, d_lse))
    for mine, again, plain, want in zip(first, second, peer, exact, strict=True):
        if want is None:
            assert mine is None
            continue
        np.testing.assert_array_equal(mine, again)
        mine, plain = np.asarray(mine, np.float64), np.asarray(plain, np.float64)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        for size in (np.linalg.norm, functools.partial(np.linalg.norm, ord=np.inf)):
            mistake, theirs = (size(x[finite] - want[finite]) for x in (mine, plain))
            # 1.5 times the error of plain JAX with the same roundings; 2^-11 and less is rounding itself.
            assert mistake <= 1.5 * max(theirs, 2**-11 * size(want[finite]))

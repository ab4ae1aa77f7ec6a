"""The Hopper kernels of `mla_decode`: how work is shared out and lowering here, numbers on a card."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mla_decode import float64

from pallas_kernels import UnsupportedError, mla_decode, target_platform
from pallas_kernels.mla_attention import mosaic_gpu as hopper
from pallas_kernels.mla_decode.shapes import CORRECTNESS, Shape

lowers = pytest.mark.skipif(jax.__version_info__ < hopper.MINIMUM_JAX, reason="needs JAX 0.11.2")


class Arith:
    """What `mosaic_gpu_shares` writes for a warp, done at once on 32 numbers."""

    CmpIPredicate = types.SimpleNamespace(slt=np.less, sgt=np.greater, sle=np.less_equal, eq=np.equal)
    addi, subi, muli, divui, remui = np.add, np.subtract, np.multiply, np.floor_divide, np.remainder
    minsi, maxsi, andi, select = np.minimum, np.maximum, np.logical_and, np.where

    @staticmethod
    def extui(_, x):
        return x.astype(int)

    @staticmethod
    def cmpi(predicate, x, y):
        return predicate(x, y)


@pytest.fixture
def warp(monkeypatch):
    """`shares` on plain numbers, but for its loop over more than 256 sequences."""
    from pallas_kernels.mla_decode import mosaic_gpu_shares as shares

    utils = types.SimpleNamespace(
        memref_ptr=lambda ref: ref.array,
        thread_idx=lambda: np.arange(32),
        getelementptr=lambda p, i, _: p[i[0]],
    )
    stand_ins = {
        "arith": Arith,
        "ir": types.SimpleNamespace(
            IntegerType=types.SimpleNamespace(get_signless=lambda _: None), MemRefType=lambda x: x
        ),
        "mgpu": types.SimpleNamespace(utils=utils),
        "llvm": types.SimpleNamespace(load=lambda _, x: x),
        "_i32": lambda value: np.full(32, value),
        "_over_lanes": lambda operation, x: np.full(32, {"add": np.sum, "max": np.max}[operation](x)),
        "_sums_up_to": np.cumsum,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(shares, name, stand_in)
    # Its loops are Pallas': here they run as they are traced.
    loop = types.SimpleNamespace(
        loop=lambda first, end: lambda body: [body(b) for b in range(int(first), int(end))],
        when=lambda condition: lambda body: body() if condition else None,
    )
    monkeypatch.setattr(shares, "pl", loop)
    return shares


@pytest.fixture
def queries(monkeypatch):
    """`to_half` of one warp on plain numbers: rows in bf16 to rows in float16, and factors."""
    from pallas_kernels.mla_decode import mosaic_gpu_queries as module

    lanes = np.arange(32)

    def ptx(text, *operands, **_):
        if text.startswith("redux"):
            return np.full(32, operands[0].max())
        high, low = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in operands)
        return high << 16 | low

    u32 = functools.partial(np.asarray, dtype=np.uint32)
    arithmetic = types.SimpleNamespace(
        CmpIPredicate=Arith.CmpIPredicate,
        addi=lambda x, y: u32(x) + u32(y),
        subi=lambda x, y: u32(x) - u32(y),
        muli=lambda x, y: u32(x) * u32(y),
        divui=lambda x, y: u32(x) // u32(y),
        remui=lambda x, y: u32(x) % u32(y),
        andi=lambda x, y: u32(x) & u32(y),
        shli=lambda x, y: u32(x) << u32(y),
        shrui=lambda x, y: u32(x) >> u32(y),
        maxui=np.maximum,
        minsi=np.minimum,
        maxsi=np.maximum,
        mulf=np.multiply,
        cmpi=lambda predicate, x, y: predicate(x, y),
        bitcast=lambda kind, x: u32(x).view(kind),
        constant=lambda _, value: np.full(32, value & 0xFFFFFFFF, np.uint32),
    )
    utils = types.SimpleNamespace(
        thread_idx=lambda: lanes,
        memref_ptr=lambda ref: ref,
        getelementptr=lambda ref, offsets, _: (ref, offsets[0] // 4),
        inline_ptx=ptx,
        when=lambda condition: contextlib.nullcontext(),
    )
    integers = types.SimpleNamespace(get_signless=lambda _: np.uint32)
    kinds = types.SimpleNamespace(get=lambda: np.float32)
    memory = types.SimpleNamespace(
        load=lambda _, place: place[0][place[1]], store=lambda value, place: np.put(place[0], place[1], value)
    )
    for name, stand_in in {
        "arith": arithmetic,
        "llvm": memory,
        "mgpu": types.SimpleNamespace(utils=utils),
        "ir": types.SimpleNamespace(
            IntegerType=integers, F32Type=kinds, IntegerAttr=types.SimpleNamespace(get=lambda _, value: value)
        ),
    }.items():
        monkeypatch.setattr(module, name, stand_in)

    def run(q):
        words = np.asarray(q).view(np.uint32)
        half, factor = np.zeros_like(words), np.zeros(len(q), np.uint32)
        for row in range(0, len(q), 4):  # Of the four warps of a program the first is run.
            module._row_of_warp(q.shape[1], words.ravel(), half.ravel(), factor, np.full(32, row // 4))
        return half.view(np.float16)[::4], factor.view(np.float32)[::4]

    return run


def test_queries_in_half_precision(queries):
    """Against the definition: largest numbers from 2^10 to 2^11 of a factor that is a power of 2."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((24, 192)) * 2.0 ** np.asarray([[-120], [-30], [0], [5], [100], [0]]).repeat(4, 0)
    q[20:] = 0
    sign = (-1) ** (np.arange(24)[:, None] // 4)  # of the largest number
    q *= np.where(q * sign < 0, 1 / 64, 1)
    q = np.asarray(jnp.asarray(q, jnp.bfloat16))
    half, factor = queries(q)
    q = q[::4].astype(np.float64)
    power = 2.0 ** np.floor(np.log2(np.maximum(np.abs(q).max(1), 2.0**-130)))
    np.testing.assert_array_equal(factor, np.clip(power, 2.0**-100, 2.0**100) / 1024)
    want = (q / factor[:, None]).astype(np.float16).reshape(-1, 3, 4, 8, 2).swapaxes(2, 3)
    np.testing.assert_array_equal(half, want.reshape(half.shape))


CAPACITY = 10**6


def share_of(shares, lengths, group, groups):
    reference = types.SimpleNamespace(type=types.SimpleNamespace(shape=lengths.shape), array=lengths)
    found = shares._find(reference, np.full(32, group), groups, CAPACITY)
    assert all((x == x[0]).all() for x in found)  # All threads agree.
    return shares.Share(*(int(x[0]) for x in found))


def check_shares(shares, lengths, groups):
    """Every block of every sequence goes to one group, its parts are found, and no share is much larger."""
    lengths = np.asarray(lengths)
    blocks = -(-lengths // shares.BLOCK)
    bounds = np.full((len(lengths), 2), -1)
    seen, parts = [[] for _ in lengths], [[] for _ in lengths]
    for group in range(groups):
        load = []

        def work(b, length, low, high, group=group, load=load):
            assert length == lengths[b]
            seen[b] += range(low, high)
            parts[b].append(b + group)
            load.append(high - low)

        share = share_of(shares, lengths, group, groups)
        shares.for_every_piece(share, lengths, bounds, group, CAPACITY, work)
        assert sum(load) <= -(-(blocks.sum() + shares.SEQUENCE_COST * len(lengths)) // groups)
    for b, count in enumerate(blocks):
        assert seen[b] == list(range(count))
        assert parts[b] == list(range(*bounds[b])) and (count or not bounds[b].any())
    numbers = [part for each in parts for part in each]
    assert len(set(numbers)) == len(numbers) and max(numbers, default=0) < len(lengths) + groups - 1


@pytest.mark.parametrize(
    "lengths, groups",
    [([0], 3), ([1], 132), ([0, 0, 500, 0, 1], 4), ([16384], 132), ([128] * 132, 132), ([300, 0] * 50, 66)],
    ids=str,
)
def test_every_block_is_shared_out_once(warp, lengths, groups):
    check_shares(warp, lengths, groups)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2000), min_size=7, max_size=7), st.sampled_from([1, 5, 66]))
def test_any_lengths_are_shared_out(warp, lengths, groups):
    check_shares(warp, lengths, groups)


def trace(shape, dtype=None, alike=False):
    """Shapes of the operands, of another dtype if given, and the function of them that calls the kernels."""
    (q, c_kv, k_rope, lengths), arrays = jax.eval_shape(
        lambda: (shape.operands()[0], {k: v for k, v in shape.operands()[1].items() if k != "scale"})
    )
    operands = [jax.ShapeDtypeStruct(x.shape, dtype or x.dtype) for x in (q, c_kv, k_rope)]

    def f(q, c_kv, k_rope, lengths, arrays):
        more = {"scale": 0.1, "alike": alike, "implementation": "mosaic_gpu"}
        return mla_decode(q, c_kv, k_rope, lengths, **more, **arrays)

    return f, (*operands, lengths, arrays)


def lower(f, operands):
    with target_platform("gpu"):
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@lowers
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(300, 300, 16),
        Shape(2, 700, 128, s_q=2, page=64),
        Shape(2, 90, 24, page=16, rank=256),
        Shape(2, 90, 8, page=16, rank=256),
        Shape(3, 300, 24, cache="float8_e4m3fn"),
        Shape(2, 700, 8, s_q=2, page=32, rank=128, cache="int8"),
    ],
    ids=str,
)
def test_lowers_for_hopper(shape, alike):
    """Two kernels, and one for queries beside codes: layouts and shared memory checked by the front end."""
    assert lower(*trace(shape, alike=alike)).count("@mosaic_gpu_v2(") == 2 + shape.quantised


@lowers
@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        (Shape(1, 128, 16), jnp.float32, "it takes bfloat16 queries"),
        (Shape(1, 128, 16, rank=192), jnp.bfloat16, "widths 192 and 64"),
        (Shape(1, 128, 16, rope=32), jnp.bfloat16, "widths 512 and 32"),
        (Shape(1, 128, 16, page=48), jnp.bfloat16, "page size 48"),
        (Shape(1, 128, 16, page=16, cache="int8"), None, "page size 16"),
        (Shape(1, 128, 9000), jnp.bfloat16, "too many rows"),
    ],
)
def test_refusals_name_the_constraint(shape, dtype, message):
    f, operands = trace(shape, dtype)
    with pytest.raises(UnsupportedError, match=message):
        lower(f, operands)


def test_not_on_cpu():
    (operands, options) = Shape(1, 8, 16).operands()
    with pytest.raises(UnsupportedError, match="older than 0.11.2|Hopper GPUs"):
        mla_decode(*operands, implementation="mosaic_gpu", **options)


def contiguous(cache, factor, options):
    cache = np.asarray(cache.astype(jnp.float32), np.float64)
    if factor is not None:
        cache *= np.asarray(factor, np.float64)[..., None]
    if "page_table" not in options:
        return cache
    table = np.asarray(options["page_table"])
    return cache[table].reshape(len(table), -1, cache.shape[-1])


LARGE_LOGITS = [Shape(2, (1000, 130), 16, cache=cache) for cache in ("bfloat16", "float8_e4m3fn", "int8")]
CASES = [*((shape, 1.0) for shape in CORRECTNESS), *((shape, 20.0) for shape in LARGE_LOGITS)]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("shape, factor", CASES, ids=lambda x: str(x))
def test_as_exact_as_plain_jax_and_repeatable(shape, factor, alike):
    operands, options = shape.operands(factor=factor)
    names = [name for name in options if name != "scale"]

    def run(implementation, times):
        static = {"scale": options["scale"], "alike": alike, "implementation": implementation}
        f = jax.jit(functools.partial(mla_decode, **static))
        for i in range(times):
            # Poison for memory not written, and a different one each time.
            jnp.full((64 << 20,), (jnp.nan, 1e30)[i], jnp.float32).block_until_ready()
            yield f(*operands, **{name: options[name] for name in names})

    first, second = run("mosaic_gpu", 2)
    (peer,) = run("blocked", 1)
    q, c_kv, k_rope, lengths = operands
    values = contiguous(c_kv, options.get("c_kv_scale"), options)
    rope = contiguous(k_rope, options.get("k_rope_scale"), options)
    exact = float64(q, lengths, values, rope, options["scale"])
    for mine, again, plain, want in zip(first, second, peer, exact, strict=True):
        np.testing.assert_array_equal(mine, again)
        mine, plain = np.asarray(mine, np.float64), np.asarray(plain, np.float64)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        for size in (np.linalg.norm, functools.partial(np.linalg.norm, ord=np.inf)):
            mistake, theirs = (size(x[finite] - want[finite]) for x in (mine, plain))
            # 1.5 times the error of plain JAX with the same roundings; 2^-11 and less is rounding itself.
            assert mistake <= 1.5 * max(theirs, 2**-11 * size(want[finite]))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "batch, heads, cache",
    [
        (1, 16, "bfloat16"),
        (1, 24, "bfloat16"),
        (40, 6, "bfloat16"),
        (5, 128, "bfloat16"),
        (150, 16, "bfloat16"),
        (5, 16, "float8_e4m3fn"),
        (3, 24, "int8"),
    ],
)
def test_a_query_finds_the_same_whatever_comes_with_it(batch, heads, cache):
    """To the bit, whatever the other sequences' lengths: so speculation chooses as plain decoding does."""
    capacity, s_q, rng = 3000, 3, np.random.default_rng(0)
    (q, *keys, _), options = Shape(batch, capacity, heads, s_q=s_q, cache=cache).operands()
    call = jax.jit(functools.partial(mla_decode, implementation="mosaic_gpu", alike=True, **options))
    for length in (3, 130, 2049, 3000):  # Within a block, over the border of one, and the whole cache.
        lengths = np.append(length, rng.integers(s_q, capacity + 1, batch - 1)).astype(np.int32)
        together = call(q, *keys, lengths)
        for i in range(s_q):
            others = rng.integers(1, capacity + 1, batch).astype(np.int32)
            alone = call(
                q[:, i : i + 1], *keys, np.where(np.arange(batch) % 2, others, lengths - s_q + 1 + i)
            )
            for mine, theirs in zip(together, alone, strict=True):
                np.testing.assert_array_equal(mine[::2, i], theirs[::2, 0])

"""Decoding attention on TPU in Pallas: one pass over each sequence's entries with an online softmax.

The grid is (sequence, block of entries), blocks of one sequence in order. Lengths and the page table are
prefetched to scalar memory, from where they choose what is copied to VMEM next: beyond a sequence's end the
same block stays, which costs no copy. A block of a paged cache is several pages, each an operand of its own.
The queries times heads of a sequence are the rows of the products. Codes are converted to the dtype of the
queries; the entries' factors enter the logits and the weights.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations

BLOCK = 512  # entries, or as many whole pages
_LANES = 128
_ROWS = 16  # the fewest rows of a bf16 tile


class Call(typing.NamedTuple):
    """What is static in one call."""

    s_q: int
    heads: int
    scale: float
    pages: int  # copied at a time; 1 for a contiguous cache
    size: int  # entries of a page, or of a block of a contiguous cache
    blocks: int  # of the longest sequence that fits
    ragged: bool  # whether the last block ends beyond the cache
    paged: bool
    quantised: bool

    @property
    def entries(self) -> int:
        """Of a block."""
        return self.pages * self.size


def unsupported(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del lengths, c_kv_scale, k_rope_scale
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}; use 'blocked'"
    codes = c_kv.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not (codes or c_kv.dtype == q.dtype):
        taken = "bfloat16 or float32 queries, and caches of the same dtype, int8 or float8_e4m3fn"
        return f"queries are {q.dtype}, the cache {c_kv.dtype}; it takes {taken}; use 'blocked'"
    if 0 in q.shape or 0 in c_kv.shape:
        return "an empty axis; use 'blocked'"
    if c_kv.shape[-1] % _LANES:
        return f"latents of width {c_kv.shape[-1]}; it takes multiples of {_LANES}; use 'blocked'"
    if page_table is not None and c_kv.shape[1] % 32:
        return f"page size {c_kv.shape[1]}; it takes multiples of 32; use 'blocked'"
    return None


def attention(
    q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale, block=BLOCK, interpret=False
):
    """Returns the output `[batch, s_q, heads, rank]` and the log-sum-exp `[batch, s_q, heads]`."""
    batch, s_q, heads, width = q.shape
    rank, slots = c_kv.shape[-1], c_kv.shape[1]
    call = _call(q, c_kv, page_table, c_kv_scale, scale, block)
    rows = -(-s_q * heads // _ROWS) * _ROWS
    q = jnp.pad(q.reshape(batch, s_q * heads, width), ((0, 0), (0, rows - s_q * heads), (0, 0)))
    capacity = slots if page_table is None else slots * page_table.shape[1]
    lengths = jnp.clip(lengths, 0, capacity)
    table = jnp.zeros((batch, 1), jnp.int32) if page_table is None else page_table

    def row(i):
        return pl.BlockSpec((1, rows, i), lambda b, block, lengths, table: (b, 0, 0))

    def entries(width, page):
        place = functools.partial(_place, call, page)
        if width is None:  # Factors lie along the lanes.
            return pl.BlockSpec((1, 1, call.size), lambda *at: (place(*at)[0], 0, place(*at)[1]))
        return pl.BlockSpec((1, call.size, width), lambda *at: (*place(*at), 0))

    arrays = [(c_kv, rank), (k_rope, k_rope.shape[-1])]
    if call.quantised:
        arrays += [(factor[:, None], None) for factor in (c_kv_scale, k_rope_scale)]
    cache = [array for array, _ in arrays for _ in range(call.pages)]
    specs = [entries(width, page) for _, width in arrays for page in range(call.pages)]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, call.blocks),
            in_specs=[row(width), *specs],
            out_specs=[row(rank), row(_LANES)],
            scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (_LANES, _LANES, rank)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, rank), q.dtype),
            jax.ShapeDtypeStruct((batch, rows, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="mla_decode",
    )(lengths, table, q, *cache)
    lse = lse[:, : s_q * heads, 0].reshape(batch, s_q, heads)
    return out[:, : s_q * heads].reshape(batch, s_q, heads, rank), lse


def _call(q, c_kv, page_table, c_kv_scale, scale, block) -> Call:
    slots, paged = c_kv.shape[1], page_table is not None
    if paged:
        pages = max(1, min(block // slots, page_table.shape[1]))
        size, blocks = slots, -(-page_table.shape[1] // pages)
    else:
        # A block that divides the capacity where there is one; else the last is masked more thoroughly.
        sizes = [n for n in range(block, 0, -_LANES) if slots % n == 0 and 2 * n >= block]
        pages, size = 1, slots if slots <= block else (sizes or [block])[0]
        blocks = -(-slots // size)
    ragged = not paged and slots % size > 0
    static = float(scale), pages, size, blocks, ragged, paged, c_kv_scale is not None
    return Call(q.shape[1], q.shape[2], *static)


def _place(call, page, b, block, lengths, table):
    """Index of the cache's row and, in blocks, of the entries where a page of a block lies."""
    length = jnp.maximum(lengths[b], 1)
    if not call.paged:
        return b, jnp.minimum(block, lax.div(length - 1, call.size))
    return table[b, jnp.minimum(block * call.pages + page, lax.div(length - 1, call.size))], 0


def _kernel(call, lengths, table, q, *refs):
    del table
    cache, (out, lse, peak, total, acc) = refs[:-5], refs[-5:]
    b, block = pl.program_id(0), pl.program_id(1)
    length = lengths[b]

    @pl.when(block == 0)
    def _():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(block * call.entries < length)
    def _():
        _add(call, q, cache, length, block, peak, total, acc)

    @pl.when(block == call.blocks - 1)
    def _():
        found = total[:, :1]
        seen = found > 0
        safe = jnp.where(seen, found, 1.0)
        out[0] = jnp.where(seen, acc[...] / safe, 0.0).astype(out.dtype)
        lse[0] = jnp.where(seen, peak[...] + jnp.log(safe), -jnp.inf)


def _add(call, q, cache, length, block, peak, total, acc):
    """Adds a block's entries to the accumulators."""
    arrays = [cache[i : i + call.pages] for i in range(0, len(cache), call.pages)]
    values, keys = (
        jnp.concatenate([ref[0] for ref in refs]).astype(q.dtype) for refs in arrays[:2]
    )  # [entries, width]
    if call.ragged:  # What lies beyond the cache is anything.
        position = lax.broadcasted_iota(jnp.int32, (call.entries, 1), 0) + block * call.entries
        values, keys = (jnp.where(position < length, x, jnp.zeros_like(x)) for x in (values, keys))
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    rank, last = values.shape[1], (((1,), (1,)), ((), ()))
    logits, rope = dot(q[0, :, :rank], values, last), dot(q[0, :, rank:], keys, last)
    factor = None
    if call.quantised:
        factor, rope_factor = (jnp.concatenate([ref[0] for ref in refs], 1) for refs in arrays[2:])
        if call.ragged:
            inside = lax.broadcasted_iota(jnp.int32, factor.shape, 1) + block * call.entries < length
            factor, rope_factor = (jnp.where(inside, x, 0.0) for x in (factor, rope_factor))
        logits, rope = logits * factor, rope * rope_factor
    logits = (logits + rope) * call.scale
    position = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + block * call.entries
    seen = length - call.s_q + 1
    if call.s_q > 1:
        seen += lax.div(lax.broadcasted_iota(jnp.int32, logits.shape, 0), call.heads)
    logits = jnp.where(position < seen, logits, -jnp.inf)
    before = peak[:, :1]
    new_peak = jnp.maximum(before, logits.max(1, keepdims=True))
    # A row that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
    below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
    weights, shrink = jnp.exp(logits - below), jnp.exp(before - below)
    total[...] = jnp.broadcast_to(total[:, :1] * shrink + weights.sum(1, keepdims=True), total.shape)
    peak[...] = jnp.broadcast_to(new_peak, peak.shape)
    weights = weights if factor is None else weights * factor
    acc[...] = acc[...] * shrink + dot(weights.astype(q.dtype), values, (((1,), (0,)), ((), ())))

"""FP8 quantisation as one would write it in torch, to be compiled: the peer of `benchmarks/quantize.py`."""

import functools

import torch

TILE, LARGEST, SMALLEST = 128, 448.0, 2.0**-100


def _scaled(x, dims, power_of_two=False):
    """E4M3 numbers and the scales of tiles, which lie along `dims`."""
    amax = x.abs().amax(dims, keepdim=True)
    scale = (amax * (1 / LARGEST)).clamp_min(SMALLEST)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
        inverse = 1 / scale
    else:
        inverse = (LARGEST / amax.clamp_min(SMALLEST)).clamp_max(1 / SMALLEST)
    return (x * inverse).to(torch.float8_e4m3fn), scale


def rows(x, power_of_two=False, swiglu=False):
    """`[rows, k]` to values `[rows, k]` and scales `[k/128, rows]`."""
    x = x.float()
    if swiglu:
        gate, up = x.chunk(2, -1)
        x = torch.nn.functional.silu(gate) * up
    values, scale = _scaled(x.unflatten(-1, (-1, TILE)), -1, power_of_two)
    return values.flatten(-2), scale.squeeze(-1).t().contiguous()


def columns(x):
    """`[rows, k]` to values `[k, rows]` and scales `[rows/128, k]`."""
    values, scale = _scaled(x.float().unflatten(0, (-1, TILE)), 1)
    return values.flatten(0, 1).t().contiguous(), scale.squeeze(1).contiguous()


def columns_of_rows(values, scales):
    """`columns` of what `rows` gave."""
    full = values.float().unflatten(-1, (-1, TILE)) * scales.t().unsqueeze(-1)
    return columns(full.flatten(-2))


def blocks(w, transpose=False):
    """`[rows, k]` to values like it, or transposed, and scales of 128x128 blocks."""
    tiles = w.unflatten(0, (-1, TILE)).unflatten(-1, (-1, TILE))
    values, scale = _scaled(tiles, (1, 3))
    values, scale = values.flatten(2).flatten(0, 1), scale[:, 0, :, 0]
    return (values.t().contiguous(), scale.t().contiguous()) if transpose else (values, scale.contiguous())


PEERS = {
    "rows": rows,
    "rows, power of two": functools.partial(rows, power_of_two=True),
    "rows of swiglu": functools.partial(rows, swiglu=True),
    "columns": columns,
    "columns of quantised rows": columns_of_rows,
    "weight blocks": blocks,
    "weight blocks, transposed": functools.partial(blocks, transpose=True),
}

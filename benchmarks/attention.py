"""Attention in the expanded form of MLA against cuDNN, forward and backward.

    PYTHONPATH=. python benchmarks/attention.py [--out results.json] [--only 'H64'] [--rounds 3] [--tune]
        [--passes forward,both] [--unchecked] [--after FILE]

Before a shape is timed, every implementation is compared with float64 on two heads of it, output, log-sum-exp
and gradients, and must repeat bit for bit (the awkward shapes are in the `gpu` tests). Where tokamax is
installed, its Pallas kernels are timed too.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import pathlib
import re
import sys
import time
import types
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import UnsupportedError, mla_attention
from pallas_kernels.mla_attention import mosaic_gpu, mosaic_gpu_forward
from pallas_kernels.mla_attention.shapes import BENCHMARK, Shape

NAMES = ("out", "lse", "dq", "dk", "dv", "dk_rope")
CHECKED_UP_TO = 16384  # rows; a matrix of scores in float64 takes 4 GiB then
CHECKED = ("mosaic_gpu", "recomputed", "cudnn", "chunked")
RECOMPUTED = functools.partial(mosaic_gpu.attention, workspace=0)  # dS twice instead of written out


def _torch(array):
    return None if array is None else torch.from_dlpack(array)


def float64(operands, options, d_out):
    """Output, log-sum-exp and gradients in float64, by torch's differentiation."""
    q, k, v = (_torch(a).double().requires_grad_() for a in operands)
    rope = options.get("k_rope")
    rope = None if rope is None else _torch(rope).double().requires_grad_()
    key = k if rope is None else torch.cat([k, rope[:, :, None].expand(*k.shape[:3], -1)], -1)
    group = q.shape[2] // k.shape[2]
    key, value = key.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    logits = torch.einsum("bshd,bthd->bhst", q, key) * q.shape[-1] ** -0.5
    rows, columns = (torch.arange(n, device="cuda") for n in (q.shape[1], k.shape[1]))
    visible = torch.ones_like(logits[:, :1], dtype=torch.bool)
    if options["causal"]:
        visible &= columns <= rows[:, None] + k.shape[1] - q.shape[1]
    if options.get("segment_ids") is not None:
        mine, theirs = _torch(options["segment_ids"]), _torch(options["kv_segment_ids"])
        visible &= mine[:, None, :, None] == theirs[:, None, None, :]
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = torch.einsum("bhst,bthd->bshd", p, value)
    leaves = [x for x in (q, k, v, rope) if x is not None]
    gradients = torch.autograd.grad(out, leaves, _torch(d_out).double())
    return [x.detach() for x in (out, lse, *gradients)]


def _with_gradients(name, causal, operands, rope, segments, d_out):
    def call(q, k, v, rope):
        options = {"causal": causal, "return_lse": True, "k_rope": rope, **segments}
        if name == "recomputed":
            with mock.patch.object(mosaic_gpu, "attention", RECOMPUTED):
                return mla_attention(q, k, v, **options, implementation="mosaic_gpu")
        return mla_attention(q, k, v, **options, implementation=name)

    out, pullback, lse = jax.vjp(call, *operands, rope, has_aux=True)
    return [x for x in (out, lse, *pullback(d_out)) if x is not None]


def _errors(got, want):
    """For each result the error's norm and its largest element, both over those of the result."""
    errors = []
    for mine, exact in zip(got, want, strict=True):
        mine = _torch(mine).double()
        finite = torch.isfinite(exact)
        if not torch.equal(finite, torch.isfinite(mine)):
            errors.append((np.inf, np.inf))
            continue
        mine, exact = mine[finite], exact[finite]
        if not exact.numel():
            errors.append((0.0, 0.0))
            continue
        difference = mine - exact
        norm = torch.linalg.norm(difference) / max(torch.linalg.norm(exact).item(), 1e-30)
        errors.append((norm.item(), (difference.abs().max() / max(exact.abs().max().item(), 1e-30)).item()))
    return errors


def check(shape: Shape) -> dict:
    """Errors of every implementation on one shape, and whether it repeats bit for bit."""
    operands, options = shape.operands()
    d_out = jax.random.normal(jax.random.key(9), (*operands[0].shape[:3], shape.d_v), jnp.bfloat16)
    exact = float64(operands, options, d_out)
    segments = {name: x for name, x in options.items() if name.endswith("segment_ids")}
    result = {"case": f"{shape} checked", "errors": {}}
    for name in CHECKED:
        if name == "chunked" and isinstance(result["errors"]["cudnn"], dict):
            continue  # The peer only where cuDNN is none.
        f = jax.jit(functools.partial(_with_gradients, name, shape.causal))
        try:
            runs = [f(operands, options.get("k_rope"), segments, d_out) for _ in range(3)]
        except UnsupportedError as refusal:
            result["errors"][name] = str(refusal).split(": ")[-1]
            continue
        errors = dict(zip(NAMES, _errors(runs[0], exact), strict=False))
        pairs = [(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)]
        errors["repeats"] = all(bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs)
        result["errors"][name] = errors
    return result


def verdict(result: dict) -> tuple[str, bool]:
    """A line on one shape, and whether ours is as exact as the best peer: 1.5 times its error, and 2^-8."""
    cells, good = [], True
    peer = result["errors"].get("cudnn")
    peer = peer if isinstance(peer, dict) else result["errors"]["chunked"]
    for name, errors in result["errors"].items():
        if not isinstance(errors, dict):
            cells.append(f"{name}: - ({errors[:30]})")
            continue
        cells.append(f"{name}: " + " ".join(f"{e[0]:.1e}" for k, e in errors.items() if k != "repeats"))
        for key, error in errors.items():
            if key == "repeats":
                repeats = error or name == "cudnn"
                good &= repeats
                cells[-1] += "" if repeats else " MOVES"
            elif name in ("mosaic_gpu", "recomputed"):
                least = 1e-6 if key == "lse" else 2**-11
                close = all(e <= 1.5 * max(p, least) for e, p in zip(error, peer[key], strict=True))
                good &= close
                cells[-1] += "" if close else f" {key} WRONG"
    return f"{result['case']:<40} " + " | ".join(cells), good


def _tokamax():
    """tokamax's attention, or None. It imports a profiler's command line that timing does not need."""
    try:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
            sys.modules.setdefault(name, types.ModuleType(name))
        tools = sys.modules["xprof.cli.tools"]
        tools.get_kernel_stats_tool = sys.modules["xprof.cli.tools.get_kernel_stats_tool"]
        import tokamax
    except ImportError as problem:
        print("without tokamax:", problem)
        return None
    return functools.partial(tokamax.dot_product_attention, implementation="mosaic")


def rivals(shape: Shape, tune: bool):
    """Attention functions of (q, k, v, k_rope, segment ids by name), by name."""

    def op(name):
        options = {"causal": shape.causal, "implementation": name}
        return lambda q, k, v, rope, segments: mla_attention(q, k, v, k_rope=rope, **segments, **options)

    def kernel(**changes):
        static = {"scale": shape.d_qk**-0.5, "causal": shape.causal, **changes}

        def f(q, k, v, rope, segments):
            ids = segments.get("segment_ids"), segments.get("kv_segment_ids")
            return mosaic_gpu.attention(q, k, v, rope, *ids, **static)[0]

        return f

    found = {"ours": op("mosaic_gpu"), "cudnn": op("cudnn")}
    if shape.documents:
        del found["cudnn"]
    if tune:
        base = mosaic_gpu_forward.default_config(shape.d_qk, shape.d_v)
        for name, change in TUNING.items():
            found[name] = kernel(config=dataclasses.replace(base, **change))
        found["recomputed"] = kernel(workspace=0)
    peer = _tokamax()
    if peer and not shape.documents and not shape.d_rope:
        found["tokamax"] = lambda q, k, v, rope, segments: peer(q, k, v, is_causal=shape.causal)
    return found


TUNING = {"64 keys": {"block_kv": 64, "stages": 4}}


def _inputs(shape: Shape):
    """Gradient of the output, and what attention takes: (q, k, v, k_rope, segment ids by name)."""
    operands, options = shape.operands()
    d_out = jax.random.normal(jax.random.key(9), (*operands[0].shape[:3], shape.d_v), jnp.bfloat16)
    segments = {name: x for name, x in options.items() if name.endswith("segment_ids")}
    return d_out, (*operands, options.get("k_rope"), segments)


def compiled(shape: Shape, passes, tune: bool) -> dict[str, dict[str, Any]]:
    """Executables of `_inputs` of a shape for each pass, by rival."""
    found: dict[str, dict[str, Any]] = {name: {} for name in passes}
    for name in passes:
        for rival, f in rivals(shape, tune).items():

            @jax.jit
            def g(d_out, operands, f=f, backward=name != "forward"):
                if not backward:
                    return f(*operands)
                *floats, segments = operands
                return jax.vjp(lambda *a: f(*a, segments), *floats)[1](d_out)

            try:
                found[name][rival] = g.lower(*jax.eval_shape(lambda: _inputs(shape))).compile()
            except Exception as problem:  # Unsupported, or out of memory: the others may still run.
                print(f"{shape} {name} {rival}: {str(problem)[:300]}", flush=True)
    return found


def run(shape: Shape, executables: dict[str, dict[str, Any]], rounds: int):
    """Times one shape; yields a row of results for each pass."""
    operands = _inputs(shape)
    for name, of_rival in executables.items():
        calls = []
        for rival, g in of_rival.items():
            call = functools.partial(g, *operands)
            try:
                jax.block_until_ready(call())
            except Exception as problem:  # Out of memory.
                print(f"{shape} {name} {rival}: {str(problem)[:300]}", flush=True)
                continue
            calls.append(timing.Rival(rival, call))
        times = timing.compare(calls, rounds=rounds)
        flops = shape.flops() + (shape.backward_flops() if name == "both" else 0)
        row = timing.row(f"{shape} {name}", flops, 0.0, times)
        row["kernels_us"] = [[name, seconds * 1e6] for name, seconds in timing.cold_kernels(calls[0].call)]
        print(timing.line(row, "cudnn"), flush=True)
        yield row


@functools.cache
def checked(shape: Shape) -> tuple[dict, bool]:
    """Checks a shape against float64, once, and prints the outcome."""
    result = check(shape)
    text, good = verdict(result)
    print(text, flush=True)
    return result, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/attention.json")
    parser.add_argument("--only", default="", help="run the shapes whose name matches this pattern")
    parser.add_argument("--passes", default="forward,both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="time other settings of our kernels too")
    parser.add_argument("--unchecked", action="store_true", help="skip the comparison with float64")
    parser.add_argument("--after", default="", help="compile, then wait for this file")
    args = parser.parse_args()
    shared = dataclasses.replace(BENCHMARK[1], d_rope=64)
    packed = [dataclasses.replace(BENCHMARK[1], documents=n) for n in (1, 8)]
    shapes = (*BENCHMARK, shared, *packed, Shape(1, 8192, 64, d_qk=128), Shape(1, 32768, 128))
    shapes = [shape for shape in shapes if re.search(args.only, str(shape))]
    passes = args.passes.split(",")
    # All compiled before any is timed, four at a time.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        executables = list(pool.map(lambda shape: compiled(shape, passes, args.tune), shapes))
    print("compiled", flush=True)
    while args.after and not pathlib.Path(args.after).exists():
        time.sleep(0.1)
    ceiling = timing.roofline()
    print(ceiling, flush=True)
    rows, good = [], True
    for shape, of_pass in zip(shapes, executables, strict=True):
        if shape.length <= CHECKED_UP_TO and not args.unchecked:
            result, fine = checked(dataclasses.replace(shape, batch=1, heads=2))
            rows.append(result)
            good &= fine
        rows += run(shape, of_pass, args.rounds)
        timing.write(args.out, rows, ceiling)
    if not good:
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

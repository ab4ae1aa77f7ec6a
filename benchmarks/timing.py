"""Times rival implementations on one device, in one run, so that their ratios mean something.

How a kernel is timed moves its figure by a fifth: under steady load a GPU runs into its power limit.
So every call is timed two ways, and rivals take turns within one run:

- *spaced*: a large fill runs before each call, which leaves the chip cool and its cache cold;
- *hot*: the calls that follow 0.35 s of the same call back to back.

Times are those of the kernels themselves, as CUPTI reports them (every kernel of the call added up,
whichever framework launched it). Without CUPTI, on a CPU say, they are host time around one call.
Import this module before JAX allocates: it turns off JAX's preallocation, so that torch finds memory.
"""

import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

FILL_BYTES = 8 << 30
WARM_SECONDS = 0.35
COOL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Rival:
    """One implementation of the work. `call` launches it once and returns its result unwaited."""

    name: str
    call: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of one call, and the largest and smallest seen."""

    spaced: float
    hot: float
    spaced_range: tuple[float, float]
    hot_range: tuple[float, float]
    clock: str  # "cupti" or "host"


def wait(result: Any) -> None:
    """Waits for a JAX or torch result."""
    leaves = jax.tree.leaves(result)
    if any(type(leaf).__module__.startswith("torch") for leaf in leaves):
        import torch

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(result)


def _cupti():
    """The CUPTI binding that JAX carries for Mosaic GPU; None where there is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext


def kernels(work: Callable[[], None]) -> list[tuple[str, float]]:
    """Runs `work`, which must wait for what it launches: (name, seconds) of each kernel, in order."""
    cupti = _cupti()
    cupti._cupti_init()
    try:
        work()
    finally:
        found = cupti._cupti_get_timings(True)
    return [(name, milliseconds * 1e-3) for name, milliseconds in found]


@jax.jit
def _fill(value):
    return jnp.full(FILL_BYTES // 4, value, jnp.int32)


def _space(i: int) -> None:
    if jax.default_backend() == "gpu":
        _fill(i).block_until_ready()


def cold_kernels(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, seconds) of each kernel of one call, with a cold cache."""

    def work():
        _space(0)
        wait(call())

    return kernels(work)[len(kernels(lambda: _space(0))) :]


def _per_call(found: Sequence[tuple[str, float]], calls: int, skip: int) -> list[float]:
    """Seconds of each call, from equally many kernels a call of which the first `skip` do not count."""
    width, rest = divmod(len(found), calls)
    if rest or width <= skip:
        raise RuntimeError(f"{len(found)} kernels for {calls} calls: cannot tell which belongs to which")
    seconds = [kernel[1] for kernel in found]
    return [sum(seconds[i + skip : i + width]) for i in range(0, len(seconds), width)]


def _host_times(call: Callable[[], Any], calls: int, before: Callable[[int], None]) -> list[float]:
    times = []
    for i in range(calls):
        before(i)
        start = time.perf_counter()
        wait(call())
        times.append(time.perf_counter() - start)
    return times


def _spaced(call: Callable[[], Any], calls: int, fill_kernels: int) -> list[float]:
    if _cupti() is None:
        return _host_times(call, calls, _space)

    def work():
        for i in range(calls):
            _space(i)
            wait(call())

    return _per_call(kernels(work), calls, fill_kernels)


def _hot(call: Callable[[], Any], calls: int, seconds: float) -> list[float]:
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            result = call()
        wait(result)  # A bounded queue: the host must not run seconds ahead.
    if _cupti() is None:
        return _host_times(call, calls, lambda _: None)

    def work():
        for _ in range(calls):
            result = call()
        wait(result)

    # CUPTI attaches within this window, a pause of the load: its first half warms up again.
    return _per_call(kernels(work), calls, 0)[calls // 2 :]


def compare(
    rivals: Sequence[Rival], *, rounds: int = 3, calls: int = 4, warm_seconds: float = WARM_SECONDS
) -> dict[str, Timing]:
    """Times the rivals in turns: `rounds` rounds of `calls` spaced calls each, then as many of hot calls.

    Args:
      rivals: implementations of the same work, checked to agree by the caller.
      rounds: rounds; the order of the rivals turns by one each round.
      calls: calls of one rival in one round.
      warm_seconds: load before the hot calls.

    Returns:
      The timing of each rival, by name.
    """
    for rival in rivals:
        wait(rival.call())
        wait(rival.call())
    _space(0)
    on_gpu = _cupti() is not None
    fill_kernels = len(kernels(lambda: _space(0))) if on_gpu else 0
    spaced: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    hot: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    turns = [[*rivals[i % len(rivals) :], *rivals[: i % len(rivals)]] for i in range(rounds)]
    # All spaced calls come before any hot ones, which would leave the chip warm for the next rival:
    # on an H200 that cost a rival up to 15%.
    if on_gpu:
        time.sleep(COOL_SECONDS)
    for rival in itertools.chain(*turns):
        spaced[rival.name] += _spaced(rival.call, calls, fill_kernels)
    for rival in itertools.chain(*turns):
        # The more calls, the less CUPTI's pause counts.
        hot_calls = max(2 * calls, min(200, int(0.1 / min(spaced[rival.name]))))
        hot[rival.name] += _hot(rival.call, hot_calls, warm_seconds)
    return {
        r.name: Timing(
            spaced=statistics.median(spaced[r.name]),
            hot=statistics.median(hot[r.name]),
            spaced_range=(min(spaced[r.name]), max(spaced[r.name])),
            hot_range=(min(hot[r.name]), max(hot[r.name])),
            clock="cupti" if on_gpu else "host",
        )
        for r in rivals
    }


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What this device reaches in this run: TFLOP/s of an 8192^3 bf16 product, and TB/s of a copy."""

    matmul_tflops_spaced: float
    matmul_tflops_hot: float
    copy_tbps: float  # Bytes read and bytes written.


def roofline(size: int = 8192, copy_bytes: int = 4 << 30) -> Roofline:
    """Measures both ceilings with XLA: random bf16 operands, and a copy of `copy_bytes`."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    source = jnp.arange(copy_bytes // 4, dtype=jnp.int32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    times = compare(
        [Rival("product", lambda: product(a, b)), Rival("copy", lambda: copy(source))], rounds=2, calls=3
    )
    flops = 2 * size**3
    return Roofline(
        matmul_tflops_spaced=flops / times["product"].spaced / 1e12,
        matmul_tflops_hot=flops / times["product"].hot / 1e12,
        copy_tbps=2 * copy_bytes / times["copy"].spaced / 1e12,
    )


def versions() -> dict[str, str]:
    """Versions of what takes part, and the device."""
    device = jax.devices()[0]
    found = {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "date": datetime.date.today().isoformat(),
    }
    try:
        import torch

        found |= {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    except ImportError:
        pass
    return found


def tflops(flops: float, seconds: float) -> float:
    """Rate in TFLOP/s."""
    return flops / seconds / 1e12


def row(case: str, flops: float, bytes_moved: float, times: Mapping[str, Timing]) -> dict[str, Any]:
    """One line of results: for every rival its times in microseconds, TFLOP/s and TB/s."""
    return {
        "case": case,
        "flops": flops,
        "bytes": bytes_moved,
        "rivals": {
            name: {
                "spaced_us": t.spaced * 1e6,
                "hot_us": t.hot * 1e6,
                "spaced_range_us": [s * 1e6 for s in t.spaced_range],
                "hot_range_us": [s * 1e6 for s in t.hot_range],
                "spaced_tflops": tflops(flops, t.spaced),
                "hot_tflops": tflops(flops, t.hot),
                "spaced_tbps": bytes_moved / t.spaced / 1e12,
                "clock": t.clock,
            }
            for name, t in times.items()
        },
    }


def write(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], ceiling: Roofline | None) -> None:
    """Writes results as JSON: versions and device, the ceilings of this run, the rows."""
    content = {
        "versions": versions(),
        "roofline": dataclasses.asdict(ceiling) if ceiling else None,
        "rows": list(rows),
    }
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")


def line(row: Mapping[str, Any], peer: str | None = None) -> str:
    """A row as text: TFLOP/s spaced / hot for each rival, and the ratio to `peer` where it took part."""
    cells = []
    for name, r in row["rivals"].items():
        cell = f"{name} {r['spaced_tflops']:.0f}/{r['hot_tflops']:.0f}"
        if peer in row["rivals"] and name != peer:
            p = row["rivals"][peer]
            cell += f" ({p['spaced_us'] / r['spaced_us']:.2f}x/{p['hot_us'] / r['hot_us']:.2f}x)"
        cells.append(cell)
    return f"{row['case']:<44} " + "  ".join(cells)

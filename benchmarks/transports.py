"""How tokens reach the experts of other GPUs, and how fast: two parts of `benchmarks/expert_parallel.py`."""

import functools
import statistics
import time

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.exchange import capacity, exchange, rounds
from dsv3_jax.parallel.transport import Wire
from pallas_kernels.remote_copy import mosaic_gpu, reference

TOKENS, WIDTH, EXPERTS, TOP_K = 32768, 7168, 256, 8
# Of the kernel that copies to other GPUs: programs, bytes of a piece, stages, stages on their way.
DIVISIONS = [
    (32, 14336, 8, 4),
    (16, 14336, 8, 4),
    (64, 14336, 8, 4),
    (96, 14336, 8, 4),
    (32, 14336, 14, 8),
    (32, 7168, 16, 8),
    (32, 28672, 6, 3),
    (16, 28672, 6, 4),
]


class Load:
    """Tokens on all GPUs and the experts that they chose at random, and how long functions of them take."""

    def __init__(self, tokens: int, width: int):
        n = self.ranks = len(jax.devices())
        mesh, self.spec = Mesh(np.array(jax.devices()), ("expert",)), P("expert")
        self.mesh, self.place = mesh, NamedSharding(mesh, self.spec)
        rng = np.random.default_rng(1)
        indices = np.argpartition(rng.random((n * tokens, EXPERTS), np.float32), TOP_K, axis=1)[:, :TOP_K]
        rank = indices // (EXPERTS // n)
        goes = np.stack([(rank == r).any(1).reshape(n, tokens).sum(1) for r in range(n)], 1)
        self.sent = goes.astype(np.int32)  # [GPU, peer]
        # Tokens that leave a GPU, counted for each peer.
        self.crossing = float(goes.sum() - np.trace(goes)) / n
        self.indices = jax.device_put(indices.astype(np.int32), self.place)
        self.x = jax.jit(
            lambda: jax.random.normal(jax.random.key(0), (n * tokens, width), jnp.bfloat16),
            out_shardings=self.place,
        )()
        self.found = {}

    def mapped(self, function):
        specs = dict(in_specs=self.spec, out_specs=self.spec, check_vma=False)
        return jax.jit(jax.shard_map(function, mesh=self.mesh, **specs))

    def seconds(self, function, *operands, same_as=None):
        """(median time of a call, its result, the call), the result the `same_as` another to the bit."""
        call = self.mapped(function)
        out = jax.block_until_ready(call(*operands))
        if same_as is not None:
            assert bool(jax.jit(lambda a, b: (a == b).all())(out, same_as)), "other values than dense's"
        times = []
        for _ in range(7):
            started = time.perf_counter()
            jax.block_until_ready([call(*operands) for _ in range(10)][-1])
            times.append((time.perf_counter() - started) / 10)
        return statistics.median(times), out, call

    def note(self, name, crossed, elapsed):
        self.found[name] = {"ms": round(1e3 * elapsed, 3), "gb_per_s": round(crossed / elapsed / 1e9, 1)}
        print(name, self.found[name], flush=True)


def bandwidths(tokens: int = TOKENS, width: int = WIDTH) -> dict[str, dict[str, float]]:
    """GB/s a GPU and milliseconds of a dense all-to-all, and of dispatch and combine by each transport."""
    load = Load(tokens, width)
    n, indices, x, crossing = load.ranks, load.indices, load.x, load.crossing
    seconds, note, found = load.seconds, load.note, load.found

    def there_and_back(to, x):
        return to.home(to.send(x))

    def in_use(to, arrived):
        used = jnp.arange(to.hops[-1].token.shape[1]) < to.hops[-1].received[:, None]
        return jnp.where(used.reshape(-1, 1), arrived, 0)

    sums = None  # Of dense.
    row, gpus = 2 * width, jax.default_backend() == "gpu"
    for transport in ("dense", "ragged", "remote") if gpus else ("dense", "gather"):
        wire = Wire("expert", n, transport, 1.25)
        room = capacity(tokens, TOP_K, EXPERTS, wire)

        def route(i, wire=wire, room=room):
            return exchange(i, EXPERTS, wire, room, rounds(i, EXPERTS, wire, room), 0)

        if transport == "dense":
            buffer = jnp.zeros((n * n * room.slots, width), jnp.bfloat16, device=load.place)
            shape = (n, room.slots, width)
            whole = (n - 1) * room.slots * row
            elapsed, *_ = seconds(
                lambda b, s=shape: lax.all_to_all(b.reshape(s), "expert", 0, 0).reshape(b.shape), buffer
            )
            note("dense all-to-all", whole, elapsed)
            del buffer
        elapsed, to, _ = seconds(route, indices)
        note(f"{transport}: plan", 0, elapsed)
        elapsed, arrived, _ = seconds(lambda to, x: to.send(x), to, x)
        note(f"{transport}: dispatch", crossing * row, elapsed)
        if transport == "dense":
            expected = load.mapped(in_use)(to, arrived)
        else:
            ours = load.mapped(in_use)(to, arrived)
            assert bool(jnp.array_equal(ours, expected)), "other tokens than dense's"
        elapsed, home, _ = seconds(lambda to, a: to.home(a), to, arrived, same_as=sums)
        sums = home if sums is None else sums
        note(f"{transport}: combine", crossing * row, elapsed)
        elapsed, *_ = seconds(there_and_back, to, x, same_as=sums)
        note(f"{transport}: dispatch and combine", 2 * crossing * row, elapsed)
        elapsed, _, call = seconds(
            lambda i, x, route=route: there_and_back(route(i), x), indices, x, same_as=sums
        )
        note(f"{transport}: plan, dispatch and combine", 2 * crossing * row, elapsed)
        if gpus:
            alone = timing.kernels(lambda call=call: timing.wait(call(indices, x)))
            print(*(f"  {name[:60]} {1e3 * elapsed:.3f} ms" for name, elapsed in alone), sep="\n", flush=True)
    dense = found["dense all-to-all"]["gb_per_s"]
    for values in found.values():
        values["of_dense"] = round(values["gb_per_s"] / dense, 3)
    return found


def copies(tokens: int = TOKENS, width: int = WIDTH) -> dict[str, dict[str, float]]:
    """GB/s a GPU and milliseconds of the kernel of `remote`, each division checked before it is timed."""
    load = Load(tokens, width)
    n, slots = load.ranks, capacity(tokens, TOP_K, EXPERTS, Wire("expert", load.ranks, "remote", 1.25)).slots
    counts = [jax.device_put(x.reshape(-1), load.place) for x in (load.sent, load.sent.T)]
    buffer = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), (n * n, slots, width), jnp.bfloat16),
        out_shardings=load.place,
    )()
    expected = load.mapped(lambda *a: reference.copy(*a, "expert", 1))(buffer, *counts)
    for how in DIVISIONS:
        run = functools.partial(mosaic_gpu.copy, axis="expert", stride=1, how=mosaic_gpu.How(*how))
        elapsed, *_ = load.seconds(run, buffer, *counts, same_as=expected)
        load.note(
            "remote: {} programs, {} bytes a piece, {} stages, {} leaving".format(*how),
            2 * width * load.crossing,
            elapsed,
        )
    return load.found

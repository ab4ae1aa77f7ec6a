"""Every mesh, ZeRO mode and remat policy of a run on a topology, and those that fit, fastest first."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.planning import flops, memory, roofline, traffic
from dsv3_jax.planning.hardware import Topology
from dsv3_jax.planning.shapes import Split, parameter_shapes

REMAT = ("none", "dots", "v3", "full")
SHARDING = ("replicated", "zero1", "fsdp")
SHOWN = 10
ROOM = 0.95  # Of HBM that a plan may fill: runtimes keep some, and memory is fragmented.


class Candidate(NamedTuple):
    """One way to run."""

    config: Config
    split: Split
    used: memory.Memory
    bound: roofline.Roofline

    @property
    def label(self) -> str:
        """Its settings, as on the command line."""
        train = self.config.train
        return f"{self.split} remat={train.remat} micro_batch_size={train.micro_batch_size}"


def evaluate(config: Config, split: Split, topology: Topology, probe: bool = False) -> Candidate:
    """The analytical model of one way to run; `probe` as of `memory.of_step`."""
    config = memory.in_nodes(config, split, topology)
    used = memory.of_step(config, split, topology.chip.platform, probe)
    moved = traffic.of_step(config, split, topology)
    bound = roofline.of_step(config, split, topology, parameter_shapes(config), moved)
    return Candidate(config, split, used, bound)


def search(config: Config, topology: Topology) -> tuple[list[Candidate], int]:
    """(the candidates that fit, the fastest first and of equals the smallest; how many were tried)."""
    room = ROOM * topology.chip.hbm
    tried = [evaluate(way, split, topology, probe=True) for way, split in _ways(config, topology)]
    best = sorted((c for c in tried if c.used.total <= room), key=_rank)
    exact = [evaluate(c.config, c.split, topology) for c in best[:SHOWN]]
    return sorted((c for c in exact if c.used.total <= room), key=_rank), len(tried)


def _rank(candidate: Candidate) -> tuple[float, float]:
    return float(f"{candidate.bound.step:.3g}"), candidate.used.total


def _ways(config: Config, topology: Topology) -> Iterator[tuple[Config, Split]]:
    n = topology.n_devices
    experts = config.model.moe.n_experts if flops.layers(config.model)[1] else 1
    for expert in (e for e in range(1, n + 1) if n % e == 0 and experts % e == 0):
        data = n // expert
        shardings = SHARDING if data > 1 else ("replicated",)
        for sharding, remat, micro in itertools.product(shardings, REMAT, _micros(config, n)):
            train = dataclasses.replace(config.train, remat=remat, micro_batch_size=micro)
            mesh = dataclasses.replace(config.mesh, pipe=1, data=data, expert=expert, sharding=sharding)
            way = dataclasses.replace(config, train=train, mesh=mesh)
            yield way, Split(data, expert, sharding)


def _micros(config: Config, n_devices: int) -> list[int]:
    """Micro-batches of 1, 2, 4 or 8 sequences a device, and the batch; each divides it and the ramp."""
    batch, ramp = config.train.batch_size, config.train.ramp_start_batch
    sizes = {n_devices * each for each in (1, 2, 4, 8)} | ({batch} if batch % n_devices == 0 else set())
    return sorted(size for size in sizes if size <= batch and batch % size == ramp % size == 0)

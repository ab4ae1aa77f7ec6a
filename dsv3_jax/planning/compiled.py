"""The real training step compiled ahead of time for TPUs that are not here, and what the compiler says of it.

`libtpu` (from PyPI) holds TPU's compiler and needs no TPU. Shapes carry their shardings; nothing is
allocated, and the program is the one that `train.py` runs on that slice.

It is compiled at XLA's lowest level of optimisation unless `JAX_OPTIMIZATION_LEVEL` names another: that takes
DeepSeek-V3 40% of the CPU time, and its peak is 2.5% from the default level's (docs/planning.md).
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import make_mesh, replicated
from dsv3_jax.planning.hardware import GIB, PlanError, Topology
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step
from pallas_kernels import target_platform


class Compiled(NamedTuple):
    """What the compiler says of a step, in bytes of one chip."""

    state: int  # Parameters, moments, router bias and the batch: the arguments.
    temporaries: int  # Gradients, activations and everything else that lives inside the step.
    peak: int
    seconds: float  # Of tracing and compiling.
    text: str  # The optimised program.


def devices(topology: Topology) -> list[Any]:
    """The chips of a TPU slice, described by libtpu.

    Raises:
      PlanError: libtpu is not installed, or has no such slice.
    """
    try:
        import libtpu  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PlanError(
            f"topology = {topology.text!r}: compiling for TPUs needs libtpu: pip install libtpu; "
            "or --no-compile for the analytical model alone"
        ) from None
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
    # Off a cloud machine libtpu finds neither and complains; any slice will do for describing another.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    try:
        found = topologies.get_topology_desc(topology.text, "tpu").devices
    except Exception as error:  # libtpu's own types differ between versions.
        reason = str(error).splitlines()[0]
        raise PlanError(f"topology = {topology.text!r}: libtpu has no such slice ({reason})") from None
    return list(found)


def compile_step(config: Config, topology: Topology) -> Compiled:
    """Compiles `training.step.make_train_step` for a TPU slice.

    Raises:
      PlanError: the step does not fit the chips' memory, or libtpu is missing.
    """
    mesh = make_mesh(config.mesh, devices(topology))
    train = config.train
    micro = train.micro_batch_size or train.batch_size
    shape = (train.batch_size // micro, micro, train.seq_len)

    def ids(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    def scalar(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

    batch: Any = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids(jnp.int32))
    batch |= {"loss_mask": ids(jnp.bool_)}
    rates = Schedules(*[scalar(jnp.float32)] * 3)
    started = time.perf_counter()
    with target_platform("tpu"):
        step: Any = make_train_step(config, mesh)
        traced = step.trace(abstract_state(config, mesh), batch, scalar(jnp.int32), rates)
        lowered = traced.lower(lowering_platforms=("tpu",))
    try:
        with _quickly():
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, topology) from None
    analysis = program.memory_analysis()
    return Compiled(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.peak_memory_in_bytes,
        time.perf_counter() - started,
        program.as_text(),
    )


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Compiles at the lowest level of optimisation unless the user asked for one."""
    asked = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0" if asked == "UNKNOWN" else asked)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", asked)


def _too_large(error: Exception, topology: Topology) -> Exception:
    """The compiler's complaint of too little memory, with its figures; any other error as it is."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    needed = re.search(r"\(([\d.]+[GMT])\)", text)
    has = topology.chip.hbm / GIB
    return PlanError(
        f"the step needs {needed.group(1) if needed else 'more memory'} a chip by the compiler's analysis, "
        f"and {topology.chip.name} has {has:.2f}G: a larger slice, mesh.sharding=fsdp, train.remat=full, a "
        "smaller train.micro_batch_size; --search tries them"
    )


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


def collectives(text: str) -> dict[str, int]:
    """How often each kind of collective stands in a compiled program's text; loops are counted once."""
    names = "|".join(COLLECTIVES)
    found: dict[str, int] = {}
    for kind in re.findall(rf"= [^=\n]*? ({names})(?:-start)?\(", text):
        found[kind] = found.get(kind, 0) + 1
    return found

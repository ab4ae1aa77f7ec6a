"""Several processes as one job: JAX's runtime started in each, what they agree on, and how they end.

    place (see `launchers`) -> start -> from_first, barrier, shared folder -> finish, or leave

Everything here also works, and does nothing, in a run alone. Arrays are summed and moved by JAX; only the
few decisions of the host (which checkpoint, which folder) go through its coordination service.
"""

import itertools
import json
import os
import re
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.config_reading import ConfigError, Problem
from dsv3_jax.parallel.launchers import Place
from dsv3_jax.parallel.lifeline import SILENCE, Lifeline

# A wait for another process ends with that process, which the lifeline sees.
_NO_LIMIT_MS = 2**31 - 1
# How a shared file system may lag behind.
_SHARED_SECONDS = 60
_lifeline: Lifeline | None = None
# Of this process. Kept here, as a signal may ask for it while JAX is half imported.
_index, _count = 0, 1
_decisions = itertools.count()


class StartError(RuntimeError):
    """The processes of a job did not find each other; the message says which and what to do."""


def start(place: Place | None, seconds: int = 300) -> None:
    """Joins the job, and returns when all its processes have; call it before the first JAX computation.

    Args:
      place: this process's; None: alone, but for TPU slices of several hosts, which JAX finds by itself.
      seconds: how long to wait for the others.

    Raises:
      StartError: they did not come, or cannot be reached.
    """
    global _lifeline, _index, _count
    import jax

    # SIGTERM is ours: one process is asked, and all agree on the step (see `training.stop`).
    jax.config.update("jax_enable_preemption_service", False)
    if place is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    elif not _on_tpu_slice():
        return
    try:
        if place is None:
            jax.distributed.initialize(initialization_timeout=seconds)
        else:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=seconds,
            )
        _index, _count = _state().process_id, _state().num_processes
        if count() > 1:
            address = _state().coordinator_address
            host = address.rsplit(":", 1)[0].strip("[]")
            _lifeline = Lifeline(index(), count(), host, from_first)
    except (RuntimeError, OSError) as error:
        where = "" if place is None else f" of {place.count} at {place.coordinator}, as process {place.index}"
        raise StartError(
            f"This process could not join the job{where}: {str(error).splitlines()[0]}. All processes must "
            "be started, each once, within the same minutes, and reach process 0 under that name and port."
        ) from error


def _on_tpu_slice() -> bool:
    """Whether JAX would find other hosts of a TPU slice; a single host has nobody to wait for."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm or os.environ.get("JAX_PLATFORMS", "tpu") == "cpu":
        return False
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    return (found[1] or 1) > 1


def _state() -> Any:
    # JAX has no public name for its coordination service; Orbax uses this one too.
    from jax._src.distributed import global_state

    return global_state


def index() -> int:
    """Of this process in the job."""
    return _index


def count() -> int:
    """Processes in the job."""
    return _count


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return index() == 0


def who() -> str:
    """Begins a message of one process of several; empty in the first."""
    return "" if is_first() else f"process {index()} of {count()}, on {socket.gethostname()}: "


def from_first(make: Callable[[], Any], error: type[Exception] = OSError) -> Any:
    """What `make()` returns in process 0, JSON, in every process.

    All call it, in the same order. An `error` that it raises in process 0 is raised in all.
    """
    if count() == 1:
        return make()
    key = f"dsv3_jax/decision/{next(_decisions)}"
    if not is_first():
        outcome = json.loads(_state().client.blocking_key_value_get(key, _NO_LIMIT_MS))
        if "error" in outcome:
            raise error(outcome["error"])
        return outcome["value"]
    try:
        value = make()
    except error as raised:
        _state().client.key_value_set(key, json.dumps({"error": str(raised)}))
        raise
    _state().client.key_value_set(key, json.dumps({"value": value}))
    return value


def barrier() -> None:
    """Waits until every process is here."""
    if count() > 1:
        _state().client.wait_at_barrier(f"dsv3_jax/barrier/{next(_decisions)}", _NO_LIMIT_MS)


def together(function: Any) -> Callable[..., Any]:
    """A jitted function whose first call waits until every process has compiled it; alone, the function.

    Processes compile at different speeds, and collectives give up on one that is late: those of CPUs after
    30 seconds.
    """
    if count() == 1:
        return function
    compiled: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not compiled:
            compiled.append(function.lower(*arguments).compile())
            barrier()
        return compiled[0](*arguments)

    return call


def share_folder(folder: Path) -> None:
    """Makes a folder in which every process sees what process 0 writes.

    Raises:
      ConfigError: this process does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if count() == 1:
        return
    mark = folder / f".job-{uuid.uuid4().hex}"
    mark = folder / from_first(lambda: (mark.touch(), mark.name)[1])
    end = time.monotonic() + _SHARED_SECONDS
    while not mark.exists():
        if time.monotonic() > end:
            fix = "does not show what process 0 writes there; give a folder that all hosts share"
            raise ConfigError([Problem("workdir", str(folder), fix)])
        time.sleep(0.1)
        os.listdir(folder)  # Makes a network file system look again.
    barrier()
    if is_first():
        mark.unlink()


def finish() -> None:
    """The end of a run that all processes have come to; waits for what process 0 still does."""
    global _lifeline
    if _lifeline is None:
        return
    import jax

    barrier()
    _lifeline.bye()
    _lifeline = None
    jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends this process of several with an exit code, and with it the others; returns in a run alone.

    JAX's own end would wait for the others for minutes.
    """
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if _lifeline is not None:
            _lifeline.leave(code)
        os._exit(code)


def give_up(error: BaseException) -> None:
    """Ends this process of several because of an error that nobody expected; returns in a run alone.

    A collective that fails is how the loss of another process shows first: then the lifeline ends us, with
    the name of that process.
    """
    if _lifeline is None:
        return
    await_loss(error)
    print(who(), file=sys.stderr)
    traceback.print_exception(error)
    leave(1)


def await_loss(error: BaseException) -> None:
    """Gives the lifeline time to end this process, if the error may come from the loss of another."""
    chain = (error, error.__cause__, error.__context__)
    status = re.compile(r"(?:[A-Z]+_?)+: ")  # JAX's errors begin with a status, "UNAVAILABLE: ".
    if _lifeline is not None and any(status.match(str(link)) for link in chain if link is not None):
        time.sleep(SILENCE + 5)

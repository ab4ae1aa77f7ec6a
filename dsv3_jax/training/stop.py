"""SIGTERM and Ctrl-C: a run finishes the step under way and saves, all its processes after the same step."""

import os
import signal
from typing import Any

from dsv3_jax.parallel import distributed


def exit_code(number: int) -> int:
    """Of a run that the signal stops. A launcher of several processes has to see that the job is not done."""
    if number == signal.SIGINT:
        return 130
    return 143 if distributed.count() > 1 else 0


class Stop:
    """What the two signals ask for. Before training there is nothing to save, and they end the process.

    Attributes:
      training: whether there is something to save; a second Ctrl-C does not wait for it.
      code: the exit code of a run that was asked to stop, else None.
    """

    def __init__(self):
        self.training, self.code = False, None
        self._votes: Any = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, _):
        impatient = number == signal.SIGINT and self.code is not None
        self.code = exit_code(number)
        # Written to the descriptor: the signal may have come while the stream was being written.
        if impatient or not self.training:
            os.write(2, b"\nstopped; the same command continues from the last checkpoint\n")
            distributed.leave(self.code)
            os._exit(self.code)
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    def agreed(self, mesh) -> int | None:
        """The exit code if the run is to stop after this step, the same in every process; call it each step.

        One process needs no agreement. Several vote, each step on its own device, and what they voted is
        read a step later, when it has long arrived: nobody waits for it.
        """
        if distributed.count() == 1:
            return self.code
        if self._votes is None:
            self._votes = _Votes(mesh)
        vote = self._votes.exchange(0 if self.code is None else 1 + self.code)
        if vote:
            self.code = vote - 1
        return self.code if vote else None


class _Votes:
    """The highest vote of all processes, of the step before."""

    def __init__(self, mesh):
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        one_a_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        local = len(mesh.local_devices)
        highest = distributed.together(jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())))
        self._cast = lambda vote: highest(
            jax.make_array_from_process_local_data(one_a_device, np.full(local, vote, np.int32))
        )
        self._before = None

    def exchange(self, vote: int) -> int:
        before, self._before = self._before, self._cast(vote)
        return 0 if before is None else int(before)

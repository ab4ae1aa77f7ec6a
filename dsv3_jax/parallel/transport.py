"""Buffers between the devices of one mesh axis: one meaning, four ways to move them.

    move(buffer [ranks, slots, ...]) -> [ranks, slots, ...]     rank i's buffer[j] becomes rank j's result[i]

- `dense`: one all-to-all of whole buffers.
- `ragged`: the slots in use alone, cut into many updates a peer: XLA's GPU kernel works on updates in
  parallel, and with one a peer it uses little of the link (3 GB/s on an H200). Not on CPU.
- `remote`: the slots in use alone, copied by a Pallas kernel straight into the peer's result
  (`pallas_kernels.remote_copy`): on Hopper in one process, on TPU in one slice.
- `gather`: everybody gets everything and takes its part; the plain reference.

Dispatch and combine of 32k tokens x 7168 on two H200s: dense 3.97 ms, ragged 4.41, remote 3.96, but this one
cannot run beside other work. So `auto` is dense, and ragged on TPU, where it is the compiler's own operation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.implementations import UnsupportedError, platform
from pallas_kernels.remote_copy import remote_all_to_all

TRANSPORTS = ("dense", "ragged", "remote", "gather")
IN_USE = ("ragged", "remote")  # These move the slots in use alone.
UPDATES = 512  # Of a ragged exchange, for each peer. TPU's takes one: each more only takes longer to compile.


@jax.tree_util.register_static  # No leaf of a route that goes through a transformation.
@dataclasses.dataclass(frozen=True)
class Wire:
    """The axis over which experts are split, and how rows travel along it."""

    axis: str
    ranks: int  # That exchange with each other.
    transport: str  # One of `TRANSPORTS`.
    slack: float  # Room for rows over what a balanced load needs; see `exchange.capacity`.
    node: int = 0  # Ranks of one node, where a token travels to a node once; 0: straight to each rank.
    stride: int = 1  # From one of the ranks that exchange with each other to the next, along the axis.
    whole: int = 0  # Ranks of the axis; 0: they all exchange with each other.

    @property
    def hops(self) -> tuple["Wire", ...]:
        """The wires that a token takes one after the other: itself, or between nodes and then within one."""
        if self.node in (0, 1, self.ranks):
            return (self,)
        part = dataclasses.replace(self, node=0, whole=self.ranks)
        between = dataclasses.replace(part, ranks=self.ranks // self.node, stride=self.node)
        return between, dataclasses.replace(part, ranks=self.node)

    @property
    def peers(self) -> list[list[int]] | None:
        """Positions on the axis of those that exchange with each other, as collectives take them."""
        if self.whole in (0, self.ranks):
            return None
        size = self.ranks * self.stride
        firsts = [block + i for block in range(0, self.whole, size) for i in range(self.stride)]
        return [list(range(first, first + size, self.stride)) for first in firsts]

    def rank(self) -> Int[Array, ""]:
        """This device's number among those that it exchanges with."""
        return lax.axis_index(self.axis) // self.stride % self.ranks


def choose(transport: str, platform: str) -> str:
    """The transport of a platform where "auto" is asked for."""
    if transport != "auto":
        return transport
    return "ragged" if platform == "tpu" else "dense"


def problems(transport: str, devices: Sequence[Any]) -> list[tuple[str, str, str]]:
    """Why these devices have no such transport, as (field, value, fix)."""

    def several(where: str) -> bool:
        return len({getattr(device, where, 0) for device in devices}) > 1

    platform, why = devices[0].platform, None
    if transport in IN_USE and platform == "cpu":
        why = "does not exist on CPUs; take 'dense' or 'gather'"
    elif transport == "remote" and platform == "gpu" and several("process_index"):
        why = "copies between the GPUs of one process; take 'dense'"
    elif transport == "remote" and platform == "tpu" and several("slice_index"):
        why = "copies between the chips of one slice; take 'ragged'"
    return [("mesh.transport", transport, why)] if why else []


def move(
    buffer: Shaped[Array, "ranks slots *rest"],
    wire: Wire,
    sent: Int[Array, " ranks"],
    received: Int[Array, " ranks"],
) -> Shaped[Array, "ranks slots *rest"]:
    """What the ranks of the axis have for this one, by source; what lies past `received` is not defined.

    Args:
      buffer: by destination.
      wire: the axis and the transport.
      sent: slots in use, from the first, for each destination.
      received: the same of what arrives.
    """
    if buffer.dtype.itemsize == 1 and buffer.ndim == 3 and buffer.shape[2] % 4 == 0:
        # Collectives know the usual dtypes on every platform: 8-bit floats travel as words.
        words = lax.bitcast_convert_type(buffer.reshape(*buffer.shape[:2], -1, 4), jnp.uint32)
        return lax.bitcast_convert_type(move(words, wire, sent, received), buffer.dtype).reshape(buffer.shape)
    if buffer.dtype.itemsize == 1:
        moved = move(lax.bitcast_convert_type(buffer, jnp.uint8).astype(jnp.int32), wire, sent, received)
        return lax.bitcast_convert_type(moved.astype(jnp.uint8), buffer.dtype)
    if wire.transport == "gather":
        return lax.all_gather(buffer, wire.axis, axis_index_groups=wire.peers)[:, wire.rank()]
    if wire.transport == "dense":
        return lax.all_to_all(buffer, wire.axis, 0, 0, axis_index_groups=wire.peers)
    return (_remote if wire.transport == "remote" else _ragged)(buffer, wire, sent, received)


def _remote(buffer, wire: Wire, sent, received):
    kernel = "mosaic_tpu" if platform() == "tpu" else "mosaic_gpu"
    try:
        return remote_all_to_all(buffer, sent, received, wire.axis, wire.stride, implementation=kernel)
    except UnsupportedError as error:
        raise ValueError(f"mesh.transport = 'remote': take 'dense' ({error})") from error


def updates(
    slots: int, rank: Int[Array, ""], counts: Int[Array, " ranks"], pieces: int = UPDATES
) -> tuple[Int[Array, " pieces"], Int[Array, " pieces"], Int[Array, " pieces"]]:
    """(offsets in my buffer, offsets in the peers' buffers, sizes) of the pieces of a ragged exchange."""
    step = -(-slots // pieces)
    first = jnp.arange(0, slots, step, dtype=jnp.int32)
    sizes = jnp.clip(counts[:, None] - first, 0, step)
    mine = jnp.arange(len(counts), dtype=jnp.int32)[:, None] * slots + first
    theirs = jnp.broadcast_to(rank * slots + first, mine.shape)
    return mine.reshape(-1), theirs.reshape(-1), sizes.reshape(-1)


def _ragged(buffer, wire: Wire, sent, received):
    slots = buffer.shape[1]
    rank = wire.rank()
    pieces = 1 if platform() == "tpu" else UPDATES
    mine, theirs, send_sizes = updates(slots, rank, sent, pieces)
    receive_sizes = updates(slots, rank, received, pieces)[2]
    flat = buffer.reshape(-1, *buffer.shape[2:])
    sizes = mine, send_sizes, theirs, receive_sizes
    moved = lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), *sizes, axis_name=wire.axis, axis_index_groups=wire.peers
    )
    return jax.lax.reshape(moved, buffer.shape)

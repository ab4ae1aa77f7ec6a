"""An all-to-all that copies only the rows in use, straight into the memory of the device that wants them.

A rank has a number of slots for every other, of which it uses the first few: how many, only the device knows.
The kernels start one copy after the other from the source into the peer's result, without a buffer between.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels import implementations
from pallas_kernels.remote_copy import mosaic_gpu, mosaic_tpu, reference

# Each module offers `copy(buffer, sent, received, axis, stride)` and `unsupported` of buffer and axis.
_MODULES = {"reference": reference, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
IMPLEMENTATIONS = tuple(_MODULES)


def remote_all_to_all(
    buffer: Shaped[Array, "ranks slots *rest"],
    sent: Int[Array, " ranks"],
    received: Int[Array, " ranks"],
    axis: str,
    stride: int = 1,
    *,
    implementation: str = "auto",
) -> Shaped[Array, "ranks slots *rest"]:
    """Rank i's `buffer[j, :sent[j]]` becomes rank j's `result[i, :received[i]]`; the slots behind are zero.

    To be called inside `shard_map`, by all devices of the mesh together. Its gradient is the same with
    swapped counts.

    Args:
      buffer: slots by destination, in a dtype of 2 or 4 bytes.
      sent: slots in use, from the first, for each destination.
      received: the same of what arrives: rank i's `received[j]` is rank j's `sent[i]`.
      axis: the mesh axis; the ranks that exchange with each other are `stride` apart on it, and blocks of
        `ranks * stride` positions follow each other.
      stride: see `axis`.
      implementation: `"auto"`, or one by name: `"mosaic_gpu"` (Hopper, one process), `"mosaic_tpu"` (one
        slice) or `"reference"` (a dense all-to-all of all slots).

    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    ranks = buffer.shape[0]
    if buffer.ndim < 2 or sent.shape != (ranks,) or received.shape != (ranks,):
        raise ValueError(
            f"remote_all_to_all: buffer {buffer.shape}, sent {sent.shape} and received {received.shape} do "
            "not fit; expected [ranks, slots, ...], [ranks] and [ranks]"
        )
    if buffer.dtype.itemsize not in (2, 4):
        raise ValueError(
            f"remote_all_to_all: buffer of {buffer.dtype}: it moves dtypes of 2 and 4 bytes; bitcast to one"
        )
    constraints = {
        name: functools.partial(module.unsupported, buffer, axis) for name, module in _MODULES.items()
    }
    ours = {"cpu": (), "gpu": ("mosaic_gpu",), "tpu": ("mosaic_tpu",)}
    preference = {platform: (*kernels, "reference") for platform, kernels in ours.items()}
    chosen = implementations.choose("remote_all_to_all", implementation, constraints, preference)
    with jax.named_scope(f"remote_all_to_all_{chosen}"):
        return _exchange(buffer, sent.astype(jnp.int32), received.astype(jnp.int32), axis, stride, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange(buffer, sent, received, axis, stride, chosen):
    if not buffer.size:
        return buffer
    return _MODULES[chosen].copy(buffer, sent, received, axis, stride)


def _forward(buffer, sent, received, *how):
    return _exchange(buffer, sent, received, *how), (sent, received)


def _backward(axis, stride, chosen, counts, d_result):
    sent, received = counts
    return _exchange(d_result, received, sent, axis, stride, chosen), None, None


_exchange.defvjp(_forward, _backward)

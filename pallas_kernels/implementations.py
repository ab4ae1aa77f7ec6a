"""How an op picks the implementation that runs.

Naming an implementation runs it or raises; `"auto"` takes the first one in the op's order of
preference that supports the call on the target platform, and logs once what it took and why.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax

log = logging.getLogger("pallas_kernels")

_alone: Any = jax.make_user_context(False)
_target: ContextVar[str | None] = ContextVar("target_platform", default=None)


class UnsupportedError(ValueError):
    """A named implementation cannot run this call; the message names the constraint and a way out."""


def platform() -> str:
    """The platform that `"auto"` chooses for: `"cpu"`, `"gpu"` or `"tpu"`."""
    return _target.get() or jax.default_backend()


def on_one_device() -> bool:
    """Whether operands are whole on one device: there is one, or `one_device`, or all mesh axes are manual.

    The compiler does not partition our kernels: on several devices they need `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or _alone.value or (not mesh.empty and mesh.are_all_axes_manual)


def one_device(alone: bool = True) -> contextlib.AbstractContextManager:
    """Says inside the block that operands are whole on one device, of however many there are, or are not.

    `jit` traces anew what it has traced where the other was said.
    """
    return _alone(alone)


@contextlib.contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Makes `"auto"` choose for `name` inside the block: ahead-of-time compilation on another machine."""
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"target_platform={name!r}: expected 'cpu', 'gpu' or 'tpu'")
    token = _target.set(name)
    try:
        yield
    finally:
        _target.reset(token)


def choose(
    op: str,
    requested: str,
    constraints: Mapping[str, Callable[[], str | None]],
    preference: Mapping[str, Sequence[str]],
) -> str:
    """The implementation of `op` to run.

    Args:
      op: the op's name, for messages.
      requested: an implementation's name, or `"auto"`.
      constraints: for every implementation, a check that returns None when it can run this call and
        otherwise the reason why not, with the nearest supported choice.
      preference: for every platform, implementations in the order in which `"auto"` tries them.

    Raises:
      UnsupportedError: the named implementation cannot run this call.
      ValueError: no implementation has that name.
    """
    if requested != "auto":
        if requested not in constraints:
            names = ", ".join(["auto", *constraints])
            raise ValueError(f"{op}: implementation={requested!r} does not exist; choose one of {names}")
        reason = constraints[requested]()
        if reason is not None:
            raise UnsupportedError(f"{op}: implementation={requested!r} cannot run this call: {reason}")
        return requested
    where = platform()
    refused = []
    for name in preference[where]:
        reason = constraints[name]()
        if reason is None:
            _announce(op, where, name, "; ".join(refused))
            return name
        refused.append(f"not {name}: {reason}")
    raise UnsupportedError(f"{op}: nothing can run this call on {where} ({'; '.join(refused)})")


@functools.cache  # Once for each distinct choice, not once a trace.
def _announce(op: str, where: str, name: str, why: str) -> None:
    log.info("%s on %s: %s%s", op, where, name, f" ({why})" if why else "")

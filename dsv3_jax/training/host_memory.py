"""Lets the C library keep what XLA:CPU frees, so that a step need not ask the kernel for it again."""

import ctypes
import sys

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Serves large blocks from the heap and never returns them; whether the C library agreed.

    XLA:CPU allocates a step's temporaries anew every step. glibc maps large blocks and unmaps them when
    freed, and each of their pages costs a fault and a clearing: a fifth of a step's CPU time. Call it
    before the first JAX computation: threads that exist keep heaps of their own, which cannot serve large
    blocks. Memory use stays at its peak until the process ends. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all([library.mallopt(name, value) == 1 for name, value in settings])

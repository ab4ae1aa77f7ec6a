"""What a failed save says: one reason, and not a traceback for each of its arrays."""

import functools
import logging
import re
import sys

_REASON = re.compile(r"(?:\[Errno \d+\] |to file \d+: )(?P<reason>[A-Z][a-z]+(?: [a-z]+)*)")


def reason(error: BaseException) -> str:
    """Why the system refused, without the chain of files that TensorStore puts before it."""
    first = str(error).splitlines()[0]
    found = _REASON.search(first)
    return found["reason"] if found else first


@functools.cache
def silence() -> None:
    """Keeps from the terminal what Orbax and TensorStore print besides the error that they raise.

    When one array cannot be written, the tasks of all others are abandoned: asyncio logs each, and
    TensorStore's threads report each to an event loop that is closed.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook

"""What the engine keeps of requests: limits, counts, pages, and each request under way."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv3_jax.generation.sampling import SamplingParams
from dsv3_jax.generation.text import Piece


class QueueFull(RuntimeError):
    """The queue has no room for another request."""


@dataclass(frozen=True)
class Limits:
    """What an engine has room for."""

    slots: int = 16  # Sequences decoded together.
    max_tokens: int = 4096  # Of a prompt and its completion.
    page_size: int = 64
    pages: int = 0  # Shared by the slots; 0: as many as all slots at `max_tokens` need.
    queue: int = 256  # Requests that may wait.
    chunk: int = 256  # Tokens of a prompt read between two steps.


@dataclass
class Counters:
    """Totals since the engine was made."""

    submitted: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    drafts: int = 0  # Steps of sequences that drafted.
    accepted: list[int] = field(default_factory=list)  # Drafts accepted, by position.
    first_token_seconds: float = 0.0  # Sum over the requests that have one.


class Pages:
    """Which pages of the pool are free."""

    def __init__(self, count: int):
        self._free = list(range(count))[::-1]
        self.count = count

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, or None if there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Frees pages; each must be in use."""
        assert not set(pages) & set(self._free) and len(set(pages)) == len(pages)
        self._free += pages


class Request:
    """A request under way. `deliver` is called from the engine's thread with every piece of the text.

    The last piece has a `finish_reason`: "stop", "length", "cancelled" or "error".
    """

    def __init__(self, prompt: np.ndarray, params: SamplingParams, deliver: Callable[[Piece], None]):
        self.prompt, self.params, self.deliver = prompt, params, deliver
        self.cancelled = self.done = False
        self.submitted = time.perf_counter()
        self.pages: list[int] = []
        self.slot = -1
        self.follower: Any = None

    def cancel(self) -> None:
        """Ends it at the next step; its pages are freed then."""
        self.cancelled = True

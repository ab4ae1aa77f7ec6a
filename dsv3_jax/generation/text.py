"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.data.tokenizers import UNKNOWN, Tokenizer
from dsv3_jax.generation.decode import Emitted
from dsv3_jax.generation.sampling import SamplingParams

MAX_PENDING = 8  # Tokens that may wait for a character to be whole; no character has more bytes than 4.


class TextStream:
    """The text of one sequence, piece by piece.

    Args:
      tokenizer: decodes.
      stop_strings: the first to appear ends the text, before it.

    Attributes:
      stopped: whether a stop string has appeared; what comes after is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._ids: list[int] = []
        self._start = self._read = 0  # Of the tokens whose text is known: where they start and end.
        self._held = ""  # Text that may be the beginning of a stop string.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often of several tokens, or empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._decode(final=False))

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        if self.stopped:
            return ""
        released = self._release(self._decode(final=True))
        held, self._held = self._held, ""
        return released + ("" if self.stopped else held)

    def _decode(self, *, final: bool) -> str:
        # With the tokens before: what a token looks like may depend on them, a leading space for one.
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        now = self._tokenizer.decode(self._ids[self._start :])
        whole = final or not now.endswith(UNKNOWN) or len(self._ids) - self._read > MAX_PENDING
        if not whole or len(now) < len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0
        for stop in self._stops:
            longest = min(len(stop) - 1, len(text))
            keep = max(keep, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Piece(NamedTuple):
    """What a step adds to a text."""

    tokens: list[int]
    log_probs: list[float]
    text: str
    finish_reason: str | None  # None: more is to come.


def stops(request: SamplingParams, eos_id: int) -> set[int]:
    return {*request.stop_tokens, *([] if request.ignore_eos else [eos_id])}


class Follower:
    """Turns what the steps emit for one request into pieces of its text."""

    def __init__(self, request: SamplingParams, tokenizer: Tokenizer | None, eos_id: int):
        self._stops = stops(request, eos_id)
        self._text = None if tokenizer is None else TextStream(tokenizer, request.stop_strings)

    def push(self, emitted: Emitted, row: int) -> Piece:
        """The piece of a step, from `Emitted` on the host; a stop string may end it before the model does."""
        tokens, log_probs, text, reason = [], [], "", None
        for j in range(int(emitted.n_tokens[row])):
            token = int(emitted.tokens[row, j])
            if token in self._stops:
                reason = "stop"
                break
            tokens.append(token)
            log_probs.append(float(emitted.log_probs[row, j]))
            text += self._text.push(token) if self._text else ""
            if self._text and self._text.stopped:
                return Piece(tokens, log_probs, text, "stop")
        if reason is None and not emitted.active[row]:
            reason = "length"
        if reason and self._text:
            text += self._text.finish()
        return Piece(tokens, log_probs, text, reason)

"""The OpenAI completions and chat-completions protocol: requests checked, answers put together."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation.sampling import RequestError, SamplingParams
from dsv3_jax.generation.text import Piece
from dsv3_jax.serving.chat import ROLES, Chat

MAX_CHOICES = 32  # Prompts times `n` of one HTTP request.
# What the protocol has and this server does not; allowed at the value that means "off".
_OFF = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "echo": (False, None),
    "tools": ([], None),
    "top_logprobs": (0, None),
}


class Job(NamedTuple):
    """One text to complete."""

    prompt: np.ndarray
    params: SamplingParams


@dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
      jobs: a text for every choice, in their order.
      chat: the answers are messages.
      stream: pieces as they come.
      usage: a stream ends with the counts of tokens.
      log_probs: the answers carry those of their tokens.
    """

    jobs: tuple[Job, ...]
    chat: bool
    stream: bool
    usage: bool
    log_probs: bool


def _field(body: dict[str, Any], name: str, kinds: Any, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    expected = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, expected) or isinstance(value, bool) != (bool in expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise RequestError(f"{name} is {value!r}, but must be {names}")
    return value


def _params(body: dict[str, Any], most: int) -> SamplingParams:
    stop = _field(body, "stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 16 or not all(isinstance(text, str) for text in stop):
        raise RequestError("stop must be a string or at most 16 strings")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    most = _field(body, name, int, most)
    if most < 1:
        raise RequestError(f"{name} is {most}, but must be at least 1")
    seed = _field(body, "seed", int, None)
    return SamplingParams(
        max_new_tokens=most,
        temperature=float(_field(body, "temperature", (int, float), 1.0)),
        top_p=float(_field(body, "top_p", (int, float), 1.0)),
        top_k=_field(body, "top_k", int, 0),
        min_p=float(_field(body, "min_p", (int, float), 0.0)),
        repetition_penalty=float(_field(body, "repetition_penalty", (int, float), 1.0)),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stop_strings=tuple(stop),
        ignore_eos=_field(body, "ignore_eos", bool, False),
    )


def _prompts(body: dict[str, Any], tokenizer: Tokenizer, prefix: Sequence[int]) -> list[np.ndarray]:
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not all(isinstance(x, int) for x in prompt) else [prompt]
    found = []
    for one in prompts:
        if isinstance(one, str) and one:
            found.append(np.array([*prefix, *tokenizer.encode(one)]))
        elif isinstance(one, str):
            found.append(np.array([*prefix] or [tokenizer.eos_id]))
        elif isinstance(one, list) and all(isinstance(x, int) and abs(x) < 2**31 for x in one):
            found.append(np.array(one, np.int64))
        else:
            raise RequestError("prompt must be a text, a list of token ids, or a list of either")
    return found


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message")
    found = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):  # Parts, of which only text is understood.
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        role = "system" if role == "developer" else role
        if role not in ROLES or not isinstance(content, str):
            raise RequestError(f"messages[{number}] needs a role of {', '.join(ROLES)} and a text as content")
        found.append({"role": role, "content": content})
    return found


def parse(
    body: Any,
    *,
    chat: Chat | None,
    tokenizer: Tokenizer,
    prefix: Sequence[int],
    max_tokens: int,
) -> Call:
    """A checked request.

    Args:
      body: the JSON of the request.
      chat: turns messages into tokens; None for plain completions.
      tokenizer: of the model.
      prefix: tokens before every prompt.
      max_tokens: of prompt and completion together; the default of a chat answer is what the prompt leaves.

    Raises:
      RequestError: names the field, its value and what it may be.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name, off in _OFF.items():
        if body.get(name) not in off:
            raise RequestError(f"{name} is {body[name]!r}, which this server does not offer: leave it out")
    prompts = _prompts(body, tokenizer, prefix) if chat is None else [chat(_messages(body))]
    n = _field(body, "n", int, 1)
    if n < 1 or n * len(prompts) > MAX_CHOICES:
        raise RequestError(
            f"n is {n} for {len(prompts)} prompts, but at most {MAX_CHOICES} texts are answered"
        )
    left = max(1, max_tokens - len(prompts[0]))
    params = _params(body, left if chat is not None else 16)
    jobs = tuple(
        # Choices differ by their seeds.
        Job(prompt, SamplingParams(**{**vars(params), "seed": (params.seed + i) % 2**32}))
        for prompt in prompts
        for i in range(n)
    )
    wanted = body.get("logprobs")
    if wanted not in (None, False, True, 0, 1):
        raise RequestError(
            f"logprobs is {wanted!r}, but this server gives those of the chosen tokens only: 1"
        )
    options = _field(body, "stream_options", dict, {})
    return Call(
        jobs,
        chat is not None,
        _field(body, "stream", bool, False),
        bool(options.get("include_usage")),
        wanted is not None and wanted is not False,
    )


class Answer:
    """Puts answers together, whole or piece by piece."""

    def __init__(self, call: Call, model: str, tokenizer: Tokenizer):
        self._call, self._tokenizer = call, tokenizer
        kind, prefix = ("chat.completion", "chatcmpl-") if call.chat else ("text_completion", "cmpl-")
        self._kind = kind
        self._head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}
        self._completed = 0

    def whole(self, pieces: list[list[Piece]]) -> dict[str, Any]:
        """The answer to a request that is not streamed: all pieces of every choice."""
        choices = []
        for index, parts in enumerate(pieces):
            tokens = [token for part in parts for token in part.tokens]
            log_probs = [value for part in parts for value in part.log_probs]
            self._completed += len(tokens)
            text = "".join(part.text for part in parts)
            choice = (
                {"message": {"role": "assistant", "content": text}} if self._call.chat else {"text": text}
            )
            choices.append(self._choice(index, choice, tokens, log_probs, parts[-1].finish_reason))
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of a choice, if anything."""
        if not self._call.chat:
            return None
        return self._chunk(
            [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], [], None)]
        )

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """One piece of a choice."""
        self._completed += len(piece.tokens)
        text = {"delta": {"content": piece.text}} if self._call.chat else {"text": piece.text}
        return self._chunk([self._choice(index, text, piece.tokens, piece.log_probs, piece.finish_reason)])

    def closing(self) -> dict[str, Any]:
        """The counts of tokens, after the last piece."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and written so far; a prompt counts once however many choices it has."""
        prompts = {id(job.prompt): len(job.prompt) for job in self._call.jobs}
        read = sum(prompts.values())
        return {
            "prompt_tokens": read,
            "completion_tokens": self._completed,
            "total_tokens": read + self._completed,
        }

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = self._kind + ".chunk" if self._call.chat else self._kind
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index, content, tokens, log_probs, reason) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        if self._call.log_probs and tokens:
            names = [self._tokenizer.decode([token]) for token in tokens]
            if self._call.chat:
                parts = zip(names, log_probs, strict=True)
                choice["logprobs"] = {
                    "content": [
                        {"token": n, "logprob": p, "bytes": list(n.encode()), "top_logprobs": []}
                        for n, p in parts
                    ]
                }
            else:
                choice["logprobs"] = {"tokens": names, "token_logprobs": log_probs, "top_logprobs": None}
        return choice

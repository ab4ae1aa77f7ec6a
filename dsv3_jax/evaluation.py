"""How well a model predicts given text: perplexity, multiple choice, an adapter for lm-evaluation-harness."""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation import Generator, RequestError, SamplingParams
from dsv3_jax.model import Transformer, forward

SMALLEST = 32  # Sequences are padded to this, or to a power of two above it.
LOGIT_ROWS = 256  # Positions of a sequence whose logits exist at once.


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    log_prob: float  # Natural logarithm, summed over its tokens.
    greedy: bool  # Each token was the most probable one.
    tokens: int


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    model: Transformer, variables: Any, tokens: Int[Array, "batch seq"], targets: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Array]:
    """(log-probability of each target, whether it is the most probable token), positions in blocks."""
    outputs = forward(model, variables, tokens)
    head = outputs.head.astype(outputs.hidden.dtype)
    rows = min(LOGIT_ROWS, tokens.shape[1])

    def block(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, target = piece
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == target

    def blocks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(block, (blocks(outputs.hidden), blocks(targets)))
    log_probs, best = (jnp.moveaxis(part, 0, 1).reshape(tokens.shape) for part in parts)
    return log_probs, best


class Scorer:
    """Scores continuations by the forward pass that trains.

    Args:
      config: the model.
      variables: its parameters and router state.
      tokenizer: of the model.
      dtype: of activations and products.
      prefix: tokens before every text; the end-of-text token where there are none.
      batch_size: sequences scored together.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        prefix: Sequence[int] = (),
        batch_size: int = 8,
    ):
        if tokenizer.vocab_size > config.vocab_size:
            raise RequestError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and model.vocab_size is "
                f"{config.vocab_size}: give the tokenizer that the model was trained with"
            )
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.prefix = tuple(prefix) or (tokenizer.eos_id,)
        self._model, self._variables = Transformer(config, dtype), variables

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """The likelihood of each (context, continuation), in tokens; the context has at least one.

        Where both do not fit the model's context together, the context is cut at its beginning.

        Raises:
          RequestError: a continuation is empty, or alone longer than the context.
        """
        longest = self.config.max_seq_len
        rows = []
        for context, continuation in pairs:
            if not 1 <= len(continuation) <= longest or not len(context):
                raise RequestError(
                    f"a continuation of {len(continuation)} tokens after {len(context)}: give at least "
                    f"one of each, and at most model.max_seq_len = {longest} to score"
                )
            text = np.array([*context, *continuation], np.int32)[-(longest + 1) :]
            rows.append((text[:-1], text[1:], len(continuation)))
        found: dict[int, Likelihood] = {}
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # Like lengths together.
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found |= zip(chosen, self._batch([rows[i] for i in chosen]), strict=True)
        return [found[i] for i in range(len(rows))]

    def _batch(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Iterator[Likelihood]:
        size = SMALLEST
        while size < len(rows[0][0]):
            size *= 2
        tokens, targets = np.zeros((2, self.batch_size, size), np.int32)
        for row, (inputs, outputs, _) in enumerate(rows):
            tokens[row, : len(inputs)], targets[row, : len(outputs)] = inputs, outputs
        log_probs, best = map(np.asarray, _score(self._model, self._variables, tokens, targets))
        for row, (inputs, _, count) in enumerate(rows):
            part = slice(len(inputs) - count, len(inputs))
            yield Likelihood(
                float(log_probs[row, part].sum(dtype=np.float64)), bool(best[row, part].all()), count
            )

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context's own end; spaces before the cut go to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context).tolist()
        whole = self.tokenizer.encode(context + continuation).tolist()
        return [*self.prefix, *before], whole[len(before) :]

    def windows(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """(context, continuation) pairs that score every token of a text once.

        A text that does not fit is read in windows that overlap by half: all but the first half-window of
        tokens have at least half a window before them.
        """
        longest = self.config.max_seq_len
        text, first = [*self.prefix, *tokens], len(self.prefix)
        end = min(first + longest, len(text)) if len(text) <= longest + first else longest
        yield text[:first], text[first:end]
        while end < len(text):
            start, end = end, min(end + longest // 2, len(text))
            yield text[max(0, end - longest - 1) : start], text[start:end]


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RequestError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise RequestError(f"{path}:{number} is not a JSON object")
            yield number, row


def perplexity(scorer: Scorer, path: str | Path, field: str = "text") -> dict[str, float | int]:
    """Of the texts in a JSONL file: nats a token, perplexity, bits a byte.

    Args:
      scorer: the model.
      path: a JSON object a line.
      field: holds the text.

    Raises:
      RequestError: a line is not what it should be, or there is no text.
    """
    pairs, size, documents = [], 0, 0
    for number, row in _lines(path):
        text = row.get(field)
        if not isinstance(text, str):
            raise RequestError(
                f"{path}:{number} has no text in its field {field!r}: name it with --text-field"
            )
        tokens = scorer.tokenizer.encode(text).tolist()
        documents, size = documents + 1, size + len(text.encode("utf-8", "replace"))
        if tokens:
            pairs += scorer.windows(tokens)
    if not pairs:
        raise RequestError(f"{path} has no text")
    found = scorer.score(pairs)
    tokens, nats = sum(one.tokens for one in found), -sum(one.log_prob for one in found)
    return {
        "documents": documents,
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / size,
    }


def multiple_choice(scorer: Scorer, path: str | Path) -> dict[str, float | int]:
    """Of a JSONL file of {"question": text, "choices": [texts], "answer": number of the right one}.

    `accuracy` takes the choice of the highest log-likelihood, `accuracy_per_byte` divides it by the choice's
    bytes first.

    Raises:
      RequestError: a line is not what it should be, or there is none.
    """
    pairs, questions = [], []
    for number, row in _lines(path):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        if not (
            isinstance(question, str)
            and isinstance(choices, list)
            and len(choices) > 1
            and all(isinstance(choice, str) and choice for choice in choices)
            and isinstance(answer, int)
            and 0 <= answer < len(choices)
        ):
            raise RequestError(
                f'{path}:{number} needs "question", "choices" (at least two texts) and "answer" (the number '
                "of the right one, from 0)"
            )
        questions.append((len(pairs), choices, answer))
        pairs += [scorer.encode_pair(question, choice) for choice in choices]
    if not questions:
        raise RequestError(f"{path} has no question")
    found = [one.log_prob for one in scorer.score(pairs)]
    right = right_per_byte = 0
    for start, choices, answer in questions:
        scores = np.array(found[start : start + len(choices)])
        sizes = np.array([len(choice.encode("utf-8", "replace")) for choice in choices])
        right += int(scores.argmax() == answer)
        right_per_byte += int((scores / sizes).argmax() == answer)
    count = len(questions)
    return {"questions": count, "accuracy": right / count, "accuracy_per_byte": right_per_byte / count}


class Harness:
    """The three methods that lm-evaluation-harness asks of a model; see `for_lm_eval`.

    Args:
      scorer: for likelihoods.
      generator: for `generate_until`, of the same model.
      batch_size: texts generated together.
    """

    def __init__(self, scorer: Scorer, generator: Generator, batch_size: int = 8):
        self.scorer, self.generator, self.texts = scorer, generator, batch_size

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """For each request, of `args` (context, continuation): (log-likelihood, whether it is greedy)."""
        pairs = [self.scorer.encode_pair(*request.args[:2]) for request in requests]
        return [(one.log_prob, one.greedy) for one in self.scorer.score(pairs)]

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """For each request, of `args` (text,): the log-likelihood of the whole text."""
        out = []
        for request in requests:
            windows = list(self.scorer.windows(self.scorer.tokenizer.encode(request.args[0]).tolist()))
            out.append(sum(one.log_prob for one in self.scorer.score(windows)))
        return out

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """For each request, of `args` (context, options): the text up to one of `options["until"]`."""
        requests = list(requests)
        found: list[str] = []
        for start in range(0, len(requests), self.texts):
            prompts, params = [], []
            for request in requests[start : start + self.texts]:
                context, options = request.args[:2]
                until = options.get("until") or []
                room = min(options.get("max_gen_toks", 256), self.scorer.config.max_seq_len - 1)
                sampled = options.get("do_sample", False)
                params.append(
                    SamplingParams(
                        max_new_tokens=room,
                        temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                        top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
                        stop_strings=(until,) if isinstance(until, str) else tuple(until),
                    )
                )
                tokens = [*self.scorer.prefix, *self.scorer.tokenizer.encode(context).tolist()]
                prompts.append(
                    tokens[-(self.scorer.config.max_seq_len - room) :]
                )  # Its end, if it is too long.
            found += [made.text for made in self.generator.generate(prompts, params)]
        return found


def for_lm_eval(harness: Harness) -> Any:
    """An `lm_eval.api.model.LM` that answers by `harness`, for `lm_eval.simple_evaluate(model=...)`."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Adapter(LM):
        def loglikelihood(self, requests):
            return harness.loglikelihood(requests)

        def loglikelihood_rolling(self, requests):
            return harness.loglikelihood_rolling(requests)

        def generate_until(self, requests):
            return harness.generate_until(requests)

    return Adapter()

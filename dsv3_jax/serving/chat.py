"""Messages to tokens, by the model's own chat template or a plain one.

The template's special tokens become tokens; those that a message spells stay text, so that nobody can end
his own turn and speak as another. To tell them apart the template is rendered with placeholders.
"""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation.folders import special_token, tokenizer_settings
from dsv3_jax.generation.sampling import RequestError

ROLES = ("system", "user", "assistant")
_PLAIN = {"system": "{}\n\n", "user": "User: {}\n\n", "assistant": "Assistant: {}\n\n"}

Chat = Callable[[Sequence[dict[str, str]]], np.ndarray]


def make_chat(tokenizer: Tokenizer, file: Path | None, prefix: Sequence[int] = ()) -> Chat:
    """`chat(messages) -> token ids`, which end where the assistant's answer begins.

    Args:
      tokenizer: of the model.
      file: its tokenizer.json; the `chat_template` of the tokenizer_config.json beside it is used. None, or
        no template: "User: ...", "Assistant: ..." as plain text.
      prefix: tokens that start every text, where the template does not place them.
    """
    settings = {} if file is None else tokenizer_settings(file)
    template = settings.get("chat_template")
    if file is None or not isinstance(template, str):
        return lambda messages: _plain(messages, tokenizer, prefix)
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer as Backend

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    compiled = environment.from_string(template)
    backend = Backend.from_file(str(file))
    names = {name: special_token(settings, name) or "" for name in ("bos_token", "eos_token")}

    def chat(messages: Sequence[dict[str, str]]) -> np.ndarray:
        marks = [f"\x02{secrets.token_hex(12)}\x03" for _ in messages]
        shown = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
        try:
            rest = compiled.render(messages=shown, add_generation_prompt=True, **names)
        except Exception as error:  # Whatever a template of others does.
            raise RequestError(f"messages: the model's chat template refuses them ({error})") from error
        tokens: list[int] = []
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise RequestError(
                    f"messages: the model's chat template has no place for a {message['role']}"
                )
            tokens += backend.encode(before, add_special_tokens=False).ids
            tokens += tokenizer.encode(message["content"]).tolist()
        return np.array(tokens + backend.encode(rest, add_special_tokens=False).ids, np.int32)

    return chat


def _refuse(message: str) -> None:
    raise ValueError(message)


def _plain(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, prefix: Sequence[int]) -> np.ndarray:
    text = "".join(_PLAIN[message["role"]].format(message["content"]) for message in messages) + "Assistant:"
    return np.array([*prefix, *tokenizer.encode(text)], np.int32)

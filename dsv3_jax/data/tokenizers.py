"""Text to token ids and back: UTF-8 bytes, or any `tokenizer.json`."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.errors import DataError

UNKNOWN = "\ufffd"  # Shown for an id that no token has, and for bytes that are not UTF-8.


class FimIds(NamedTuple):
    """The tokens that open a document's prefix, suffix and middle (DeepSeek-V3 §4.1)."""

    prefix: int
    suffix: int
    middle: int


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        ...

    @property
    def eos_id(self) -> int:
        """Closes every document."""
        ...

    @property
    def fim_ids(self) -> FimIds | None:
        """None: the tokenizer has no fill-in-the-middle tokens."""
        ...

    @property
    def identity(self) -> str:
        """Equal identities mean equal tokenizers."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """The ids of `text`; never a special token, even where the text spells one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "n"]]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Never raises: what has no text becomes U+FFFD."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer called `spec`: "byte", or the path of a `tokenizer.json`.

    Raises:
      DataError: no such file, not a tokenizer, or one without an end-of-text token.
    """
    return ByteTokenizer() if spec == "byte" else JsonTokenizer(spec)


class ByteTokenizer:
    """UTF-8 bytes, then five special tokens. Lossless, and needs no file."""

    special = ("<|eos|>", "<|pad|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    vocab_size = 256 + len(special)
    eos_id = 256
    pad_id = 257
    fim_ids = FimIds(258, 259, 260)
    identity = "byte"

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        # "replace" is for lone surrogates, which JSON can spell but UTF-8 can't.
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "n"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (self._piece(int(i)) for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def _piece(self, i: int) -> bytes:
        if 0 <= i < 256:
            return bytes([i])
        return (self.special[i - 256] if 256 <= i < self.vocab_size else UNKNOWN).encode()


# A `tokenizer.json` does not say which of its tokens ends a text, so it is found by name.
_EOS_NAMES = (
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos|>",
    "<eos>",
    "</s>",
    "[EOS]",
)
_FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
)


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    The end-of-text token is what a `tokenizer_config.json` beside it says, or a well-known name.
    """

    def __init__(self, path: str):
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(
                "data.tokenizer", path, 'no such file; give "byte" or the path of a tokenizer.json'
            )
        # Imported here: the byte tokenizer starts without it.
        from tokenizers import Tokenizer as Backend

        try:
            content = file.read_bytes()
            self._backend = Backend.from_buffer(content)
        except Exception as error:  # The library raises bare Exception.
            raise DataError("data.tokenizer", path, f"not a tokenizer.json ({error})") from error
        # Text that spells a special token is text; only the pipeline places special tokens.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = (_configured_eos(file), *_EOS_NAMES)
        eos = next((vocabulary[name] for name in names if name in vocabulary), None)
        if eos is None:
            raise DataError(
                "data.tokenizer",
                path,
                'no end-of-text token; name it in a tokenizer_config.json beside it ("eos_token")',
            )
        self.eos_id: int = eos
        self.identity = f"sha256:{hashlib.sha256(content).hexdigest()} eos:{eos}"
        fim = next((names for names in _FIM_NAMES if all(n in vocabulary for n in names)), None)
        self.fim_ids = None if fim is None else FimIds(*(vocabulary[n] for n in fim))

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "n"]]:
        legal = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encodings = self._backend.encode_batch_fast(legal, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        text, run = [], []
        for i in map(int, ids):
            if 0 <= i < self.vocab_size:
                run.append(i)
            else:
                text += [self._backend.decode(run, skip_special_tokens=False), UNKNOWN]
                run = []
        return "".join([*text, self._backend.decode(run, skip_special_tokens=False)])


def _configured_eos(tokenizer: Path) -> str | None:
    try:
        config: Any = json.loads((tokenizer.parent / "tokenizer_config.json").read_text("utf-8"))
        token = config.get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None

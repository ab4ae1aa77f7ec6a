"""Real text where there is no network: the Python files of this machine, and a BPE tokenizer of them.

    python benchmarks/python_text.py TEXT.jsonl [--bytes 300e6]
        [--tokenizer TOKENIZER.json] [--vocabulary 16384]

Every file that is UTF-8 becomes a document, once, in the order of their SHA-256, until the bytes are enough.
The tokenizer is a byte-level BPE, as DeepSeek-V3's is (arXiv 2412.19437, section 4.1), with the tokens that
fill-in-the-middle needs; it is trained on the first documents, `TRAINED` bytes of them.
"""

import argparse
import hashlib
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TRAINED = 40e6
SPECIAL = ("<|eos|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def documents(limit: float) -> Iterator[str]:
    """Texts of this installation of Python and its packages, until they have `limit` bytes."""
    paths = sysconfig.get_paths()
    folders = {Path(folder).resolve() for folder in (sys.prefix, *(paths[k] for k in ("stdlib", "purelib")))}
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py") if file.is_file()}
    contents = {hashlib.sha256(data).digest(): data for data in (file.read_bytes() for file in files)}
    size = 0
    for key in sorted(contents):
        if size >= limit:
            return
        try:
            yield contents[key].decode()
        except UnicodeDecodeError:
            continue
        size += len(contents[key])


def train_tokenizer(texts: Iterator[str], vocabulary: int, out: str) -> None:
    """Writes the `tokenizer.json` of a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--bytes", type=float, default=300e6)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--vocabulary", type=int, default=16384)
    arguments = parser.parse_args()
    texts = list(documents(arguments.bytes))
    with open(arguments.out, "w") as out:
        for text in texts:
            out.write(json.dumps({"text": text}) + "\n")
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    first = [text for text, size in zip(texts, sizes, strict=True) if size < TRAINED]
    print(f"{arguments.out}: {len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes")
    if arguments.tokenizer:
        train_tokenizer(iter(first), arguments.vocabulary, arguments.tokenizer)
        print(f"{arguments.tokenizer}: {arguments.vocabulary} tokens, trained on {len(first)} documents")


if __name__ == "__main__":
    main()

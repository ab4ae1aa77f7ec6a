"""The tokenised cache: what it holds, how it is split, and that damage or change never goes unseen."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizers import load_tokenizer

TEXTS = [f"hello world {i} " * (i + 1) for i in range(10)]


def _texts(corpus, documents):
    tokens = [documents.tokens[s : s + n] for s, n in zip(documents.starts, documents.lengths, strict=True)]
    return [corpus.tokenizer.decode(t) for t in tokens]


def _folder(config):
    (manifest,) = Path(config.cache_dir).rglob("manifest.json")
    return manifest.parent


def test_split_holds_every_document_once(make_config):
    config = make_config(TEXTS)
    corpus = open_corpus(config)
    train, validation = corpus.split(0.2)
    assert (len(train), len(validation)) == (8, 2)
    assert sorted(_texts(corpus, train) + _texts(corpus, validation)) == sorted(TEXTS)
    for side in (train, validation):
        assert [f"/{n:04d}.txt" for n in side.numbers] == [side.name(int(n))[-9:] for n in side.numbers]
        assert _texts(corpus, side) == [TEXTS[n] for n in side.numbers]
    assert np.array_equal(open_corpus(config).split(0.2)[1].numbers, validation.numbers)


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 1), (0.3, 3), (0.999, 9)])
def test_each_side_has_a_document(make_config, fraction, held_out):
    train, validation = open_corpus(make_config(TEXTS)).split(fraction)
    assert (len(train), len(validation)) == (10 - held_out, held_out)


@pytest.mark.parametrize("texts", [["only one"], ["one", "", ""]])
def test_one_document_is_refused(make_config, texts):
    with pytest.raises(DataError, match=r"^data.source = .* has 1 documents with text; two are needed"):
        open_corpus(make_config(texts))


def test_empty_documents_are_left_out(make_config):
    corpus = open_corpus(make_config(["", "a", "", "b", ""]))
    assert len(corpus) == 2
    assert [corpus.name(i)[-8:] for i in range(2)] == ["0001.txt", "0003.txt"]


@pytest.mark.parametrize("special", [0, 70000])
def test_any_tokenizer_and_the_width_of_its_ids(make_config, save_tokenizer, tmp_path, special):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, ["</s>"])
    if special:  # A vocabulary that needs 32 bits.
        content = json.loads(path.read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": special, "content": "<far>"})
        content["model"]["vocab"]["<far>"] = special
        path.write_text(json.dumps(content))
    corpus = open_corpus(make_config(TEXTS, tokenizer=str(path)))
    assert corpus.tokens.dtype == (np.uint32 if special else np.uint16)
    expected = load_tokenizer(str(path)).encode_batch(TEXTS)
    assert corpus.tokens.tolist() == np.concatenate(expected).tolist()
    assert len(corpus.tokens) < sum(map(len, TEXTS))  # It does merge.


def _damage(kind, folder):
    tokens = folder / "tokens.bin"
    if kind == "flipped byte":
        content = bytearray(tokens.read_bytes())
        content[7] ^= 1
        tokens.write_bytes(content)
    elif kind == "short":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif kind == "missing":
        (folder / "offsets.bin").unlink()
    elif kind == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["names.bin"]
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["flipped byte", "short", "missing", "manifest", "manifest entry"])
def test_damage_is_reported_and_repaired(make_config, caplog, kind):
    config = make_config(TEXTS)
    before = open_corpus(config)
    tokens, content = before.tokens.tolist(), before.content
    _damage(kind, _folder(config))
    after = open_corpus(config)
    assert (after.tokens.tolist(), after.content) == (tokens, content)
    assert "is made again" in caplog.text


def test_changed_text_is_read_again(make_config, caplog):
    before = open_corpus(make_config(TEXTS)).content
    config = make_config(["other"], validation_fraction=0.2)  # Overwrites the first file.
    corpus = open_corpus(config)
    assert corpus.tokenizer.decode(corpus.tokens[:5]) == "other"
    assert corpus.content != before
    assert "the text or the tokenizer changed" in caplog.text


def test_unchanged_text_is_not_read_again(make_config, monkeypatch):
    config = make_config(TEXTS)
    open_corpus(config)
    monkeypatch.setattr("dsv3_jax.data.corpus._tokenise", pytest.fail)
    open_corpus(config)


def test_content_is_of_the_text_not_of_the_files(make_config, tmp_path):
    config = make_config(TEXTS)
    before = open_corpus(config).content
    for file in (tmp_path / "texts").iterdir():
        file.touch()
    assert open_corpus(config).content == before


def test_two_processes_at_once(make_config):
    config = make_config(TEXTS * 20)
    code = (
        "import sys\n"
        "from dsv3_jax.config import DataConfig\n"
        "from dsv3_jax.data.corpus import open_corpus\n"
        "print(open_corpus(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2])).content)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, config.source, config.cache_dir], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [open_corpus(config).content] * 2

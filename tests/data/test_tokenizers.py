"""Tokenizers: lossless on text, and never an exception on ids."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizers import ByteTokenizer, load_tokenizer

DEEPSEEK = ["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]


@pytest.fixture(scope="module", params=["byte", "json"])
def tokenizer(request, tmp_path_factory, save_tokenizer):
    if request.param == "byte":
        return load_tokenizer("byte")
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json", DEEPSEEK))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=st.text(st.characters(categories=["Cs", "Lu"])))
def test_lone_surrogates_are_replaced(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(
        "?" if 0xD800 <= ord(c) < 0xE000 else c for c in text
    )


@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 300)))
def test_decode_never_raises(tokenizer, ids):
    tokenizer.decode(ids).encode("utf-8")


def test_byte_ids_are_utf8():
    byte = ByteTokenizer()
    assert byte.encode("aé").tolist() == [0x61, 0xC3, 0xA9]
    assert byte.vocab_size == 261
    assert byte.decode([0x61, 0xC3, 256, 300, -1]) == "a\ufffd<|eos|>\ufffd\ufffd"


def test_special_tokens_spelt_in_text_stay_text(tokenizer):
    for text in ["<｜end▁of▁sentence｜>", "a<｜fim▁begin｜>b", "<|eos|>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids.tolist()) & {tokenizer.eos_id, *tokenizer.fim_ids}


def test_special_ids_by_name(tmp_path, save_tokenizer):
    path = save_tokenizer(tmp_path / "tokenizer.json", DEEPSEEK)
    loaded = load_tokenizer(path)
    names = Tokenizer.from_file(path).id_to_token
    assert [names(i) for i in (loaded.eos_id, *loaded.fim_ids)] == DEEPSEEK
    assert loaded.vocab_size == Tokenizer.from_file(path).get_vocab_size()


def test_eos_from_the_config_beside_it(tmp_path, save_tokenizer):
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<stop>"])
    plain = load_tokenizer(path)
    assert (plain.eos_id, plain.fim_ids) == (0, None)
    for token in ("<stop>", {"content": "<stop>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(path).eos_id == 1
    assert load_tokenizer(path).identity != plain.identity


@pytest.mark.parametrize("content", [None, b"{}", b"not json", b"\xff\xfe"])
def test_bad_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^data.tokenizer = '{path}': (no such file|not a tokenizer.json)"):
        load_tokenizer(str(path))


def test_tokenizer_without_eos_is_refused(tmp_path, save_tokenizer):
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", []))

"""A model's chat template: its special tokens are tokens, those that a user types are text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsv3_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from dsv3_jax.generation import RequestError
from dsv3_jax.serving.chat import make_chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<|User|>", "<|Assistant|>"]


@pytest.fixture
def file(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "tokenizer.json"


def test_special_tokens_are_the_templates_alone(file):
    tokenizer = load_tokenizer(str(file))
    chat = make_chat(tokenizer, file)
    bos, eos, user, assistant = range(256, 260)
    messages = [
        {"role": "user", "content": "hi<|Assistant|>"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "{{ 1 }}"},
    ]
    expected = [
        bos,
        user,
        *tokenizer.encode("hi<|Assistant|>"),
        assistant,
        *tokenizer.encode("yo"),
        eos,
        user,
    ]
    expected += [*tokenizer.encode("{{ 1 }}"), assistant]
    assert chat(messages).tolist() == expected
    assert expected.count(assistant) == 2  # What the user typed is not one.
    with pytest.raises(RequestError, match="no system here"):
        chat([{"role": "system", "content": "x"}])


def test_without_a_template():
    tokenizer = ByteTokenizer()
    chat = make_chat(tokenizer, None, prefix=(7,))
    tokens = chat([{"role": "user", "content": "hi"}]).tolist()
    assert tokens[0] == 7 and tokenizer.decode(tokens[1:]) == "User: hi\n\nAssistant:"

"""`dsv3 generate` and `dsv3 eval` on a released folder and on its import, against transformers."""

import json

import numpy as np
import pytest

from dsv3_jax.cli import main
from tests.convert.generated import CONFIGS

WORDS = [*(f"w{i}" for i in range(30)), "<eos>"]
PROMPT = "w3 w1 w4 w1 w5"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(transformers' model, a folder that it wrote, the import of it)."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.convert.test_parity import random_model

    transformers.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("text")
    model = random_model(CONFIGS["v3_5"])
    model.save_pretrained(path / "hf")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path / "hf" / "tokenizer.json"))
    assert main(["import", "--from", str(path / "hf"), "--to", str(path / "ours")]) == 0
    return model, path / "hf", path / "ours"


def test_greedy_text(both, capsys):
    import torch

    model, *folders = both
    ids = torch.tensor([[WORDS.index(word) for word in PROMPT.split()]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=30,
        pad_token_id=30,
    )
    words = [WORDS[i] for i in out[0, ids.shape[1] :].tolist()]
    expected = " ".join(words[: words.index("<eos>")] if "<eos>" in words else words)
    assert len(expected.split()) > 3  # Or it shows little.
    capsys.readouterr()
    for folder in folders:
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "0"]
        assert main(["generate", "--checkpoint", str(folder), *arguments]) == 0
        assert capsys.readouterr().out.strip() == expected


def test_perplexity(both, tmp_path, capsys):
    import torch

    model, *folders = both
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 30, length) for length in (9, 14)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in text)}) + "\n" for text in texts))
    nats = 0.0
    for text in texts:  # The end-of-text token opens each.
        ids = torch.from_numpy(np.append(30, text))[None]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
        nats -= log_probs[:-1].gather(1, ids[0, 1:, None]).sum().item()
    for folder in folders:
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(folder), "--perplexity", str(file)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["tokens"] == 23
        # Float32 logits that differ by 2e-5 of their size, which is near 5.
        np.testing.assert_allclose(found["nats_per_token"], nats / 23, rtol=5e-5)

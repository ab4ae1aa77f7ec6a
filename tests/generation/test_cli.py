"""`dsv3 generate` on what a training run leaves, against the generator on the same weights."""

import dataclasses
import json
import re

import jax
import pytest

from dsv3_jax.checkpoint.manager import Checkpoints
from dsv3_jax.cli import main, serve
from dsv3_jax.config import CheckpointConfig, Config, TrainConfig
from dsv3_jax.data.tokenizers import ByteTokenizer
from dsv3_jax.generation import Generator, SamplingParams
from dsv3_jax.model import Transformer
from dsv3_jax.training.state import TrainState
from tests.model.test_transformer import changed, make_variables

MODEL = changed(
    vocab_size=264, n_layers=1, moe={"n_dense_layers": 1}, mtp={"depth": 1}, max_seq_len=64, norm_eps=1e-5
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = Config(model=MODEL, checkpoint=CheckpointConfig(every=1), train=TrainConfig(seq_len=32))
    variables = make_variables(Transformer(MODEL))
    checkpoints = Checkpoints(folder / "checkpoints", config)
    optimizer = jax.tree.map(lambda x: x, variables["params"])
    state = {"train": TrainState(variables["params"], variables["router"], optimizer)}  # pyright: ignore
    checkpoints.save(1, state, {})
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


def test_generate(workdir, capfd, monkeypatch):
    monkeypatch.chdir(workdir.parent)  # A relative path, as people give it.
    code = main(
        ["generate", "--checkpoint", workdir.name, "--prompt", "def f", "--max-new-tokens", "12"]
        + ["--temperature", "0", "--speculate", "--cache-dtype", "fp32"]
    )
    out, err = capfd.readouterr()
    assert code == 0, err
    generator = Generator(MODEL, make_variables(Transformer(MODEL)), ByteTokenizer(), speculate=1)
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    expected = "".join(piece.text for piece in generator.stream("def f", params))
    assert out == expected + "\n"
    assert "tokens/s" in err and "drafts accepted" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x" * 64], "64 tokens.*max_seq_len is 64"),
        (["--prompt", "x", "--speculate", "3"], "3 drafts.*depth is 1"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt-file", "missing.txt"], "missing.txt"),
        (["--prompt", "x", "--tokenizer", "missing.json"], "missing.json"),
    ],
)
def test_one_line_says_what_is_wrong(workdir, capfd, arguments, message):
    assert main(["generate", "--checkpoint", str(workdir), *arguments]) == 2
    err = capfd.readouterr().err
    assert re.search(message, err) and "Traceback" not in err


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("::", 1), ("10.0.0.7", 1), ("box", 1)],
)
def test_a_server_that_others_reach_says_so(capfd, host, open_to_others):
    serve.warn_of(host)
    assert capfd.readouterr().err.count(f"warning: --host {host} ") == open_to_others

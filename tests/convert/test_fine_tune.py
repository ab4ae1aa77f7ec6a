"""Weights from a folder, trained, and given back: what the first step sees, and what leaves at the end."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.cli import main
from dsv3_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from dsv3_jax.data import Loader
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.pretrained import forward, load_pretrained
from dsv3_jax.training import initial
from dsv3_jax.training.state import abstract_state
from tests.convert import folders
from tests.convert.folders import CONFIG
from tests.convert.generated import MSCALES, latent, plain

ROOT = Path(__file__).parents[2]


def run_of(folder, model=CONFIG, **train):
    """A configuration that starts from a folder."""
    return Config(model=model, train=TrainConfig(init_from=str(folder), seq_len=32, **train))


def starting(folder, mesh=None, model=CONFIG):
    config = run_of(folder, model)
    config = dataclasses.replace(config, mesh=mesh or MeshConfig(data=1))
    assert initial.problems(config, "no such run") == []
    return initial.first_state(config, make_mesh(config.mesh)), config


# ------------------------------------------------------------------------------------- the first state


@pytest.mark.parametrize("kind", ["huggingface", "ours", "sharded"])
def test_first_state(tmp_path, kind):
    """Parameters and router bias by indices written out by hand, the prediction layer too; no moments."""
    tensors = folders.random_tensors()
    source = folders.write(tmp_path / "hf", tensors=tensors)
    if kind == "ours":
        assert main(["import", "--from", str(source), "--to", str(tmp_path / "ours")]) == 0
        source = tmp_path / "ours"
    mesh = MeshConfig(data=2, expert=4, sharding="fsdp") if kind == "sharded" else None
    state, config = starting(source, mesh)
    abstract = abstract_state(config, make_mesh(config.mesh))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)
    moe, mtp = state.params["moe_layers"]["moe"], state.params["mtp_1"]
    layer = "model.layers.2.mlp."
    bias = np.asarray(state.router["moe_layers"]["moe"]["bias"])[1]
    np.testing.assert_array_equal(bias, tensors[layer + "gate.e_score_correction_bias"])
    down = tensors[layer + "experts.3.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(moe["down"])[1, 3], down.T)
    merge = tensors["model.layers.3.eh_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(mtp["merge"]), merge.T)
    assert not any(np.any(np.asarray(moment)) for moment in jax.tree.leaves(state.optimizer))


def test_prediction_layers(tmp_path, caplog):
    """A run without them leaves them out and says so; a run with more than there are is refused."""
    source = folders.write(tmp_path / "hf")
    without = dataclasses.replace(CONFIG, mtp=dataclasses.replace(CONFIG.mtp, depth=0))
    state, _ = starting(source, model=without)
    assert "mtp_1" not in state.params and "mtp_1" not in state.router
    assert "1 prediction layers are left out" in caplog.text
    more = dataclasses.replace(CONFIG, mtp=dataclasses.replace(CONFIG.mtp, depth=2))
    found = initial.problems(run_of(source, more), tmp_path)
    assert found[0] == (
        "model.mtp.depth",
        2,
        "the weights have 1 prediction layers; set --config.model.mtp.depth=1",
    )


# ----------------------------------------------------------------------------------- refused beforehand


def test_every_difference_in_one_message(tmp_path):
    """Each field with its value and the fix; what has no part in the logits may differ."""
    source = folders.write(tmp_path / "hf")
    moe = dataclasses.replace(CONFIG.moe, n_experts=8, routed_scale=1.0, bias_speed=0.01, sequence_loss=0.0)
    rope = dataclasses.replace(CONFIG.rope, yarn_factor=1.0)
    attention = dataclasses.replace(CONFIG.attention, kind="gqa", implementation="reference")
    other = dataclasses.replace(
        CONFIG, d_model=32, attention=attention, moe=moe, rope=rope, max_seq_len=48, init_std=1.0
    )
    found = {field: (value, fix) for field, value, fix in initial.problems(run_of(source, other), tmp_path)}
    assert {field: value for field, (value, _) in found.items()} == {
        "model.d_model": 32,
        "model.attention.kind": "gqa",
        "model.moe.n_experts": 8,
        "model.moe.routed_scale": 1.0,
        "model.rope.yarn_factor": 1.0,
        "train.init_from": str(source),
    }
    assert found["model.d_model"][1] == "the weights have 16; set --config.model.d_model=16"
    assert "dsv3 inspect" in found["train.init_from"][1]


def test_a_folder_that_cannot_be_read_and_a_run_that_no_longer_needs_it(tmp_path):
    ((field, value, fix),) = initial.problems(run_of(tmp_path / "none"), tmp_path / "run")
    assert (field, value) == ("train.init_from", str(tmp_path / "none")) and "no such directory" in fix
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    assert initial.problems(run_of(tmp_path / "none"), tmp_path / "run") == []


def test_a_bias_that_could_not_be_exported_is_refused(tmp_path):
    """DeepSeek-V2's class has no router bias: a run that moves one could not give its weights back."""
    from dsv3_jax.pretrained import save_pretrained
    from tests.convert.generated import random_variables

    config = latent("softmax", 12, 4, False, 16.0, 1, (0, 1), None, True, False)
    save_pretrained(tmp_path / "hf", config, random_variables(config))
    ((field, value, fix),) = initial.problems(run_of(tmp_path / "hf", config), tmp_path)
    assert (field, value) == ("model.moe.bias_speed", 0.001) and "set --config.model.moe.bias_speed=0" in fix


def words(path, names, added=()):
    """A tokenizer.json of whole words; `added` beyond its own vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>", *added])
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def test_the_tokenizer_is_that_of_the_weights(tmp_path):
    """Of the folder, of ours, or with further tokens; another vocabulary is refused."""
    source = folders.write(tmp_path / "hf")
    names = [f"word{i}" for i in range(20)]
    its_own = words(source / "tokenizer.json", names)
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "ours")]) == 0

    def found(folder, tokenizer):
        config = dataclasses.replace(run_of(folder), data=DataConfig(tokenizer=tokenizer))
        return initial.problems(config, tmp_path)

    more, other = (
        words(tmp_path / "a" / "t.json", names, ["<x>"]),
        words(tmp_path / "b" / "t.json", names[::-1]),
    )
    for folder in (source, tmp_path / "ours"):
        assert found(folder, its_own) == found(folder, more) == []
        for wrong in (other, "byte"):
            ((field, value, fix),) = found(folder, wrong)
            assert (field, value) == ("data.tokenizer", wrong)
            assert "20 of 20 tokens of the weights have another id; use " in fix


# ---------------------------------------------------------------------------------------- the whole way


def train(folder, *arguments):
    """`python train.py` in a process of its own, warnings as errors."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    (folder / "torch.py").write_text("raise ImportError")  # TensorBoardX would import it: seconds.
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    command = [sys.executable, "-W", "error", "train.py", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_fine_tune_and_give_back(tmp_path):
    """The commands of docs/released-models.md on a folder that transformers wrote.

    The first step's loss is that of transformers' model on the same tokens (float32 both: 2e-5, the bound of
    `test_parity`); what is exported is read by transformers with the logits of the trained run.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.convert.test_parity import random_model

    transformers.logging.disable_progress_bar()
    config = latent("sigmoid", 12, 4, True, 2.5, 1, (1, 1), MSCALES[1], True, False)
    config = dataclasses.replace(config, vocab_size=264)
    reference = random_model(config)
    reference.config.bos_token_id = 7  # Without a part in the logits: it comes back.
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_text("MIT")
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text number {i} " * 40)

    file, run = tmp_path / "run.py", tmp_path / "run"
    assert main(["inspect", str(tmp_path / "hf"), "--write-config", str(file)]) == 0
    data = {"source": f"files:{tmp_path}/texts/*.txt", "cache_dir": str(tmp_path / "tokens")}
    data |= {"mask_documents": False, "validation_fraction": 0.3}
    changes = {f"data.{name}": value for name, value in data.items()}
    changes |= {"train.steps": 2, "train.seq_len": 16, "train.batch_size": 2, "train.loss_chunk": 0}
    changes |= {
        "train.precision": "fp32",
        "train.log_every": 1,
        "train.eval_batches": 1,
        "train.remat": "none",
    }
    changes |= {"train.sample_tokens": 0, "optimizer.peak_lr": 0.01, "optimizer.warmup_steps": 0}
    options = [f"--config.{name}={value}" for name, value in changes.items()]
    code, output = train(tmp_path, f"--config={file}", f"--workdir={run}", *options)
    assert code == 0, output
    assert f"weights of {tmp_path / 'hf'}" in output
    assert json.loads((run / "config.json").read_text())["train"]["init_from"] == str(tmp_path / "hf")

    rows = Loader(DataConfig(**data), split="train", seq_len=16, seed=0).take(2)
    with torch.no_grad():
        logits = reference(torch.from_numpy(rows["tokens"].astype(np.int64))).logits
    targets = torch.from_numpy(rows["targets"].astype(np.int64))
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").numpy()
    expected = float(losses[rows["loss_mask"]].mean())
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first["ce_loss"], expected, rtol=2e-5)

    out = tmp_path / "out"
    assert main(["export", "--from", str(run), "--to", str(out)]) == 0
    tree = json.loads((out / "config.json").read_text())
    assert tree["bos_token_id"] == 7 and (out / "LICENSE").read_text() == "MIT"
    assert tree.get("dtype", tree.get("torch_dtype")) == "float32"
    trained = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    tokens = rows["tokens"].astype(np.int64)
    with torch.no_grad():
        theirs = trained(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(forward(plain(config), load_pretrained(run)[1], tokens.astype(np.int32)))
    size = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * size)
    assert np.abs(theirs - logits.numpy()).max() > 1e-3 * size  # It was trained.

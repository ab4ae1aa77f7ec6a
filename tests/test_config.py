"""Configurations: bad ones are refused whole and early, and good ones train."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from dsv3_jax.config import Config, config_dict
from dsv3_jax.config_checks import check_mesh, typed
from dsv3_jax.config_reading import ConfigError, override
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state, init_state
from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT}/configs/tiny.py"

# What is asked for, and the start of the line that must answer: field, value, and what to do about it.
BAD = {
    "unknown key": (
        ["model.n_layer=3"],
        ["model.n_layer = '3': unknown field; did you mean model.n_layers?"],
    ),
    "unknown key of another section": (
        ["model.n_headz=3"],
        ["model.n_headz = '3': unknown field; did you mean model.attention.n_heads?"],
    ),
    "wrong type": (["train.steps=many"], ["train.steps = 'many': must be a whole number, for example"]),
    "a list of the wrong things": (
        ["optimizer.milestones=['x']"],
        ["optimizer.milestones = ('x',): must be a list of finite numbers"],
    ),
    "heads that do not divide": (
        ["model.attention.kind=gqa", "model.attention.n_kv_heads=3"],
        ["model.attention.n_kv_heads = 3: must divide model.attention.n_heads = 4"],
    ),
    "odd rotated width": (
        ["model.attention.qk_rope_head_dim=15"],
        ["model.attention.qk_rope_head_dim = 15: RoPE turns pairs, so it must be even"],
    ),
    "pairs that all turn alike": (
        ["model.rope.theta=1", "model.rope.yarn_factor=4"],
        ["model.rope.theta = 1.0: must be above 1"],
    ),
    "ranks above the width": (
        ["model.attention.q_lora_rank=129", "model.attention.kv_lora_rank=500"],
        ["model.attention.q_lora_rank = 129: ", "model.attention.kv_lora_rank = 500: "],
    ),
    "top_k above the experts": (
        ["model.moe.top_k=17", "model.moe.n_groups=1", "model.moe.topk_groups=1"],
        ["model.moe.top_k = 17: at most n_experts = 16"],
    ),
    "top_k above the groups": (["model.moe.top_k=9"], ["model.moe.top_k = 9: at most 8: topk_groups = 2 "]),
    "groups that do not divide": (
        ["model.moe.n_groups=3"],
        ["model.moe.n_groups = 3: must divide n_experts = 16"],
    ),
    "choices": (
        ["model.attention.kind=mla2", "mesh.sharding=all", "model.moe.implementation=fast"],
        [
            "model.attention.kind = 'mla2': choose one of mla, mha, gqa, mqa",
            "mesh.sharding = 'all': choose one of replicated, zero1, fsdp",
            "model.moe.implementation = 'fast': choose one of auto, ",
        ],
    ),
    "a share of nothing in host memory": (
        ["optimizer.host_share=0.5"],
        ["optimizer.host_share = 0.5: all moments are in device memory: leave it 1.0, or set "],
    ),
    "no share in host memory": (
        ["optimizer.memory=host", "optimizer.host_share=0"],
        ["optimizer.host_share = 0.0: is a share of the moments, above 0 to 1"],
    ),
    "mesh larger than the devices": (
        ["mesh.data=4", "mesh.expert=4"],
        ["mesh.expert = 4: data=4 x expert=4 does not fit 8 devices; nearest that fit: data="],
    ),
    "batch that does not divide": (
        ["mesh.data=3"],
        ["train.batch_size = 8: a micro-batch of 8 sequences must divide"],
    ),
    "missing file": (["data.source=files:/nowhere/*.txt"], ["data.source = 'files:/nowhere/*.txt': "]),
    "missing tokenizer": (["data.tokenizer=/nowhere/t.json"], ["data.tokenizer = '/nowhere/t.json': "]),
    "tokenizer larger than the vocabulary": (
        ["model.vocab_size=100"],
        ["model.vocab_size = 100: the tokenizer 'byte' has "],
    ),
}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs the command line up to the training itself, which must not be reached; returns what it prints."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(jax, "jit", None)  # Nothing is compiled.

    def run(*arguments, workdir=tmp_path / "work"):
        with pytest.raises(SystemExit) as stopped:
            train.parse([TINY, f"--workdir={workdir}", *arguments])
        assert stopped.value.code == 2
        assert not workdir.exists()
        return capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_configuration(refused, kind):
    changes, expected = BAD[kind]
    title, *lines = refused(*(f"--config.{change}" for change in changes))
    assert title == f"{len(expected)} problem{'s' * (len(expected) > 1)} in the configuration:"
    for line, start in zip(sorted(lines), sorted(expected), strict=True):
        assert line.startswith("  " + start) and len(line.split(": ", 1)[1]) > 5


def test_a_workdir_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    title, line = refused(workdir=tmp_path / "file" / "run")
    assert line == f"  workdir = '{tmp_path}/file/run': {tmp_path}/file is not a directory; choose another"


def test_all_problems_come_in_one_message(refused, tmp_path):
    (tmp_path / "file").write_text("")
    kinds = ["unknown key", "odd rotated width", "top_k above the groups", "mesh larger than the devices"]
    kinds += ["missing file", "missing tokenizer"]
    changes = [f"--config.{change}" for kind in kinds for change in BAD[kind][0]]
    title, *lines = refused(
        *changes, "--config.model.d_model", "0", "stray", workdir=tmp_path / "file" / "run"
    )
    found = "\n".join(lines)
    for kind in kinds:
        assert all("  " + start in found for start in BAD[kind][1]), kind
    assert "  model.d_model = 0: must be at least 1" in found
    assert "  stray = '': expected --config.FIELD=VALUE" in found and "  workdir = " in found
    assert title.startswith(f"{len(lines)} problems")


def test_a_missing_config_file_and_the_exit_code_of_the_process(tmp_path):
    command = [sys.executable, "train.py", "--config=nowhere.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "config = 'nowhere.py': no such file; there are " in done.stderr and "configs/tiny.py" in done.stderr
    )


def test_values_of_the_command_line():
    tree = config_dict()
    text = [
        "train.steps=1e3",
        "optimizer.milestones=(0.5,1)",
        "model.tie_embeddings=true",
        "data.tokenizer=7x",
    ]
    assert override(tree, text) == []
    config = typed(tree, further=lambda config: ())
    assert config.train.steps == 1000 and type(config.train.steps) is int
    assert config.optimizer.milestones == (0.5, 1.0) and config.model.tie_embeddings is True
    assert config.data.tokenizer == "7x"
    assert typed(config_dict()) == Config()  # Nothing asked for: the defaults.


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"attn": {"heads": [4]}}}, "model.attn = {'heads': [4]}: unknown field; "),
        ({"modle": {"d_model": 4}}, "modle = {'d_model': 4}: unknown field; did you mean model"),
        ({"model": [1, 2]}, "model = [1, 2]: must be a section of fields"),
        ({"optimizer": {"milestones": [0.5, None]}}, "optimizer.milestones = [0.5, None]: must be a list of"),
        ({"train": {"steps": True}}, "train.steps = True: must be a whole number"),
        ({"optimizer": {"peak_lr": float("nan")}}, "optimizer.peak_lr = nan: must be a finite number"),
    ],
)
def test_wrong_values_of_a_file_are_reported_whatever_they_are(tree, message):
    with pytest.raises(ConfigError) as refused:
        typed(tree)
    assert len(refused.value.problems) == 1 and f"  {message}" in str(refused.value)


# ------------------------------------------------------------------------------- random configurations

# Values that mostly fit together ...
SPACE = {
    "model.d_model": [8, 16, 7],
    "model.n_layers": [1, 2],
    "model.tie_embeddings": [False, True],
    "model.attention.kind": ["mla", "mla", "mha", "gqa", "mqa"],
    "model.attention.n_heads": [2, 4],
    "model.attention.n_kv_heads": [1, 2],
    "model.attention.q_lora_rank": [0, 4],
    "model.attention.kv_lora_rank": [4, 6],
    "model.rope.yarn_factor": [1.0, 4.0],
    "model.rope.interleaved": [True, False],
    "model.moe.n_dense_layers": [0, 1, 2],
    "model.moe.n_experts": [4, 8],
    "model.moe.top_k": [1, 2],
    "model.moe.n_groups": [1, 2, 4],
    "model.moe.topk_groups": [1, 1, 2],
    "model.moe.n_shared": [0, 1, 2],
    "model.moe.gate": ["sigmoid", "softmax"],
    "model.moe.group_score": ["top2_sum", "max"],
    "model.moe.communication_loss": [0.0, 0.1],
    "model.mtp.depth": [0, 1, 2],
    "model.mtp.kind": ["sequential", "parallel"],
    "optimizer.moment_dtype": ["float32", "bfloat16"],
    "optimizer.clip_norm": [0.0, 1.0],
    "train.seq_len": [4, 6],
    "train.batch_size": [8, 16],
    "train.micro_batch_size": [0, 8],
    "train.ramp_start_batch": [0, 8],
    "train.precision": ["bf16", "fp32"],
    "train.remat": ["none", "full", "dots", "v3"],
    "train.loss_chunk": [0, 2],
    "data.mask_documents": [False, True],
    "mesh.data": [1, 2, -1],
    "mesh.expert": [1, 2, 4],
    "mesh.sharding": ["replicated", "zero1", "fsdp"],
}
# ... and values that mostly or never do.
SPOILED = {
    "model.d_model": 0,
    "model.attention.kind": "none",
    "model.attention.n_kv_heads": 3,
    "model.attention.q_lora_rank": 64,
    "model.attention.qk_rope_head_dim": 3,
    "model.rope.theta": 1.0,
    "model.rope.yarn_factor": 0.5,
    "model.moe.n_experts": 6,
    "model.moe.top_k": 4,
    "model.mtp.depth": 4,
    "train.batch_size": 12,
    "train.micro_batch_size": 5,
    "train.ramp_until": 0.0,
    "train.loss_chunk": 3,
    "mesh.data": 5,
    "mesh.expert": -1,
}
FIXED = {
    "model.vocab_size": 16,
    "model.d_ff": 8,
    "model.attention.qk_nope_head_dim": 4,
    "model.attention.v_head_dim": 4,
    "model.attention.head_dim": 4,
    "model.moe.d_ff_expert": 4,
    "model.attention.qk_rope_head_dim": 4,
    "train.ramp_until": 0.5,
}


def config_of(values):
    """The configuration, or None when it is refused with a reason for every problem."""
    tree = config_dict()
    assert override(tree, (f"{path}={value}" for path, value in (FIXED | values).items())) == []
    try:
        return typed(tree, further=lambda config: check_mesh(config, 8))
    except ConfigError as error:
        assert error.problems and all(
            problem.fix and problem.field in str(error) for problem in error.problems
        )
        return None


def batch_shapes(config):
    train = config.train
    micro = train.micro_batch_size or train.batch_size
    shape = (train.batch_size // micro, micro, train.seq_len)
    batch_sharding(make_mesh(config.mesh)).shard_shape(shape)  # Raises if it does not divide.
    names = ("tokens", "targets", "positions", "segment_ids")
    return {name: np.zeros(shape, np.int32) for name in names} | {"loss_mask": np.ones(shape, bool)}


RATES = Schedules(*np.float32((1e-2, 1e-3, 0.3)))


@settings(max_examples=16, derandomize=True)
@given(
    st.fixed_dictionaries({path: st.sampled_from(values) for path, values in SPACE.items()}),
    st.sets(st.sampled_from(sorted(SPOILED)), max_size=2),
)
def test_a_random_configuration_is_refused_or_has_a_step(values, spoiled):
    config = config_of(values | {path: SPOILED[path] for path in spoiled})
    if config is None:
        return
    mesh, batch = make_mesh(config.mesh), batch_shapes(config)
    state = abstract_state(config, mesh)
    count = np.int32(len(batch["tokens"]))
    after, metrics = jax.eval_shape(make_train_step(config, mesh), state, batch, count, RATES)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before
    assert metrics.losses.mtp_loss.shape == (config.model.mtp.depth,)


def random_values(rng):
    return {path: values[rng.integers(len(values))] for path, values in SPACE.items()}


def random_valid(seed):
    rng = np.random.default_rng(seed)
    while True:
        config = config_of(random_values(rng))
        if config is not None:
            return config


@pytest.mark.parametrize("seed", range(2))
def test_random_valid_configurations_train_a_step(seed):
    config = random_valid(seed)
    mesh, batch = make_mesh(config.mesh), batch_shapes(config)
    state = init_state(config, mesh)
    before = np.asarray(state.params["embedding"])
    state, metrics = make_train_step(config, mesh)(state, batch, np.int32(len(batch["tokens"])), RATES)
    assert metrics.finite and np.isfinite(metrics.losses.loss)
    assert np.any(np.asarray(state.params["embedding"]) != before)


def test_both_outcomes_are_common():
    rng = np.random.default_rng(0)
    found = [config_of(random_values(rng)) is not None for _ in range(100)]
    assert 0.2 < np.mean(found) < 0.9

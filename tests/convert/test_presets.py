"""The released models: their counts, from the shapes, and their configurations."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax.core import meta

from dsv3_jax import inspection
from dsv3_jax.cli import main
from dsv3_jax.config import MTPConfig
from dsv3_jax.config_checks import typed
from dsv3_jax.convert import compare, hf_config, hf_config_write, mapping, run_config
from dsv3_jax.convert.shapes import shapes
from dsv3_jax.model import Transformer, init_variables
from tests.convert import folders
from tests.convert.folders import CONFIG

CONFIGS = Path(__file__).parents[2] / "configs"
# Published totals in billions, all digits given (papers and model cards; llama.cpp prints two decimals).
# Published active parameters, and what the release leaves out of them.
PUBLISHED = {
    "v3_671b": ("671.03", "36.7", ["embedding"]),
    "v2_236b": ("235.74", "21", ["embedding"]),
    "v2_lite": ("15.71", "2.4", ["embedding"]),
    "moonlight_16b": ("15.96", "2.24", ["embedding", "head"]),
    "kimi_k2": ("1026.41", "32", ["embedding"]),
    "moe_16b": ("16.38", "2.8", []),
    "llm_7b": ("6.9", "6.9", []),
    "llm_67b": ("67.4", "67.4", []),
}
# Name: vocabulary, width, layers, dense, FFN, attention parameters a layer, experts, shared, top, expert FFN.
MLA_COMPRESSED = 1536 + 512, lambda d, h: d * 1536 + 1536 * h * 192 + d * 576 + 512 * h * 256 + h * 128 * d
MLA_PLAIN = 512, lambda d, h: d * h * 192 + d * 576 + 512 * h * 256 + h * 128 * d
MHA = 0, lambda d, h: 4 * d * d
SHAPES = {
    "v3_671b": (129280, 7168, 61, 3, 18432, 128, MLA_COMPRESSED, 256, 1, 8, 2048),
    "v2_236b": (102400, 5120, 60, 1, 12288, 128, MLA_COMPRESSED, 160, 2, 6, 1536),
    "v2_lite": (102400, 2048, 27, 1, 10944, 16, MLA_PLAIN, 64, 2, 6, 1408),
    "moonlight_16b": (163840, 2048, 27, 1, 11264, 16, MLA_PLAIN, 64, 2, 6, 1408),
    "kimi_k2": (163840, 7168, 61, 1, 18432, 64, MLA_COMPRESSED, 384, 1, 8, 2048),
    "moe_16b": (102400, 2048, 28, 1, 10944, 16, MHA, 64, 2, 6, 1408),
    "llm_7b": (102400, 4096, 30, 30, 11008, 32, MHA, 0, 0, 0, 0),
    "llm_67b": (102400, 8192, 95, 95, 22016, 64, (0, lambda d, h: 2 * d * d + 2 * d * 8 * 128), 0, 0, 0, 0),
}


def preset(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return typed(module.get_config())


def by_hand(name):
    """(total, active) of the main model, from the table of the paper."""
    vocab, d, layers, dense, ff, heads, (norms, attention), experts, shared, top, ff_expert = SHAPES[name]
    a_layer = attention(d, heads) + norms + 2 * d
    expert = 3 * d * ff_expert
    both = 2 * vocab * d + d + layers * a_layer + dense * 3 * d * ff
    moe = layers - dense
    fixed = both + moe * (shared * expert + d * experts)
    return fixed + moe * experts * expert, fixed + moe * top * expert


def decimals(number):
    return len(number.partition(".")[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name):
    config = preset(name).model
    main_model, extra = inspection.count_parameters(config)
    found = inspection.total(main_model)
    assert found == by_hand(name)
    total, active, left_out = PUBLISHED[name]
    assert f"{found.total / 1e9:.{decimals(total)}f}" == total
    used = found.active - sum(main_model[part].active for part in left_out)
    # Some are rounded, some cut: off by less than one in the last digit.
    assert abs(used / 1e9 - float(active)) < 10.0 ** -decimals(active)
    # The folder's tensors, copies left out, are the same parameters.
    tensors = mapping.tensors(config).values()
    sizes = [t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in tensors if not t.copy_of]
    biases = sum(t.shape[0] for t in tensors if t.leaf and t.leaf[0] == "router")
    assert sum(sizes) - biases == found.total + inspection.total(extra).total


def test_prediction_layer_of_v3():
    """Its own 11.5B are published without `eh_proj`, whose 103M come on top."""
    _, extra = inspection.count_parameters(preset("v3_671b").model)
    assert f"{(inspection.total(extra).total - extra['merge'].total) / 1e9:.1f}" == "11.5"
    assert extra["merge"].total == 2 * 7168 * 7168


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("v3_671b", 576 * 61),
        ("v2_lite", 576 * 27),
        ("llm_67b", 2 * 8 * 128 * 95),
        ("llm_7b", 2 * 4096 * 30),
    ],
)
def test_cache(name, elements):
    assert inspection.cache_elements(preset(name).model) == elements


def test_v2_caches_93_percent_less_than_67b():
    """DeepSeek-V2, abstract: 93.3% less, both as deployed: V2's at 6 bits an element against 16."""
    v2, dense = (inspection.cache_elements(preset(name).model) for name in ("v2_236b", "llm_67b"))
    assert f"{100 * (1 - v2 * 6 / (dense * 16)):.1f}" == "93.3"


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_and_back(name):
    config = preset(name).model
    tree = json.loads(json.dumps(hf_config_write.to_hf(config)))
    back = hf_config.from_hf(tree)
    assert compare.same_model(back.config, config)
    assert not back.notes
    assert back.config.max_seq_len == config.max_seq_len


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configuration_that_fine_tunes_it(name):
    """What `dsv3 inspect DIR --write-config FILE` writes is a valid run of the same model."""
    model = preset(name).model
    scope: dict = {}
    exec(run_config.text(model, Path("weights"), "byte", Path("run.py")), scope)
    config = typed(scope["get_config"]())
    assert compare.differences(model, config.model) == []
    assert (config.train.init_from, config.data.tokenizer) == ("weights", "byte")
    assert config.model.max_seq_len == model.max_seq_len
    without = model.moe.n_dense_layers < model.n_layers and not mapping.has_bias(model)
    assert not (without and config.model.moe.bias_speed)


def test_kimi_k2_is_the_class_of_v3():
    config = preset("kimi_k2").model
    tree = hf_config_write.to_hf(config) | {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
    }
    assert hf_config.from_hf(tree).config == hf_config.from_hf(tree | {"model_type": "deepseek_v3"}).config


def test_inspect_prints(capsys):
    assert main(["inspect", "--config", str(CONFIGS / "v3_671b.py")]) == 0
    out = capsys.readouterr().out
    assert "671,026,404,352" in out
    assert "682,636,472,320" in out
    assert "35,136 elements: 70,272 bytes" in out
    assert main(["inspect", "--config", "configs/no_such.py"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    """Every subcommand adds its parser without JAX, so that `dsv3 --help` answers at once."""
    code = (
        "import sys\nfrom dsv3_jax import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'orbax'} & set(sys.modules)\nassert not heavy, heavy"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert out.returncode == 0, out.stderr
    assert all(name in out.stdout for name in ("import", "export", "inspect"))


def test_conversions_do_without_jax(tmp_path):
    """Importing it takes as long as converting gigabytes."""
    folders.write(tmp_path / "hf")
    code = (
        "import sys\nfrom dsv3_jax.cli import main\nhf, ours, back = sys.argv[1:]\n"
        "assert main(['import', '--from', hf, '--to', ours]) == 0\n"
        "assert main(['export', '--from', ours, '--to', back]) == 0\n"
        "assert main(['inspect', back]) == 0\n"
        "heavy = {'jax', 'flax', 'orbax', 'tensorstore'} & set(sys.modules)\nassert not heavy, heavy"
    )
    paths = [str(tmp_path / name) for name in ("hf", "ours", "back")]
    command = [sys.executable, "-c", code, *paths]
    out = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("name", ["v3_671b", "moe_16b", "llm_67b", "parallel"])
def test_shapes_are_those_of_the_model(name):
    """What conversions and counts take from the configuration is what the modules declare."""
    parallel = dataclasses.replace(CONFIG, mtp=MTPConfig(depth=2, kind="parallel"), tie_embeddings=True)
    config = parallel if name == "parallel" else preset(name).model
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    tree = meta.unbox(jax.eval_shape(lambda rng: init_variables(Transformer(config), rng), key))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert {tuple(part.key for part in path): leaf.shape for path, leaf in flat} == shapes(config)

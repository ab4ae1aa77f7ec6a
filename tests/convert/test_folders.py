"""Folders in and out: the same tensors, byte for byte, through memory, our folder and Orbax."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.cli import main
from dsv3_jax.config import MeshConfig
from dsv3_jax.convert import compare, fp8, load, mapping, native, opened
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.pretrained import load_pretrained, save_pretrained
from tests.convert import folders
from tests.convert.folders import BF16, CONFIG, E4M3, HF

WIDE = HF | {"hidden_size": 160, "moe_intermediate_size": 136, "q_lora_rank": 130, "qk_nope_head_dim": 70}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def quantised(tensors):
    """Linear layers as random E4M3 with random scales: their bytes need not come from quantisation."""
    rng, found = np.random.default_rng(5), {}
    for name, value in tensors.items():
        linear = "_proj" in name and "eh_proj" not in name
        if not linear:
            found[name] = value
            continue
        found[name] = rng.uniform(-440, 440, value.shape).astype(E4M3)
        blocks = [-(-size // 128) for size in value.shape]
        found[name + "_scale_inv"] = rng.uniform(1e-4, 1e-3, blocks).astype(np.float32)
    return found


def released_fp8(path):
    return folders.write(path, WIDE | {"quantization_config": FP8}, quantised(folders.random_tensors(WIDE)))


def fused(tensors):
    """The experts of a layer as two tensors."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        one = [
            [tensors[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            for e in range(4)
        ]
        found[f"{layer}.experts.gate_up_proj"] = np.stack([np.concatenate(parts[:2]) for parts in one])
        found[f"{layer}.experts.down_proj"] = np.stack([parts[2] for parts in one])
    return found


def same_arrays(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_every_tensor_where_it_belongs(tmp_path):
    """A few of each kind, by indices written out by hand."""
    tensors = folders.random_tensors(dtype=np.float32)
    config, variables = load_pretrained(folders.write(tmp_path / "hf", tensors=tensors))
    assert compare.same_model(config, CONFIG)
    p, r = variables["params"], variables["router"]
    t = {name.removeprefix("model."): value for name, value in tensors.items()}

    def equal(ours, theirs):
        np.testing.assert_array_equal(np.asarray(ours), theirs)

    equal(p["embedding"], t["embed_tokens.weight"])
    equal(p["head"], t["lm_head.weight"].T)
    equal(p["final_norm"]["scale"], t["norm.weight"])
    moe = p["moe_layers"]
    equal(moe["attention"]["w_dq"][1], t["layers.2.self_attn.q_a_proj.weight"].T)
    equal(moe["attention"]["w_uq_qr"][0, :, 1], t["layers.1.self_attn.q_b_proj.weight"][10:].T)
    equal(p["dense_layers"]["attention"]["w_uk_uv"][0, :, 0], t["layers.0.self_attn.kv_b_proj.weight"][:11].T)
    equal(moe["attention"]["w_o"][1, 1], t["layers.2.self_attn.o_proj.weight"][:, 5:].T)
    equal(moe["moe"]["gate_up"][1, 3, :, :8], t["layers.2.mlp.experts.3.gate_proj.weight"].T)
    equal(moe["moe"]["gate_up"][0, 2, :, 8:], t["layers.1.mlp.experts.2.up_proj.weight"].T)
    equal(moe["moe"]["down"][1, 0], t["layers.2.mlp.experts.0.down_proj.weight"].T)
    equal(moe["moe"]["shared"]["down"][0], t["layers.1.mlp.shared_experts.down_proj.weight"].T)
    equal(moe["moe"]["centroids"][1], t["layers.2.mlp.gate.weight"].T)
    equal(r["moe_layers"]["moe"]["bias"][1], t["layers.2.mlp.gate.e_score_correction_bias"])
    equal(p["mtp_1"]["merge"], t["layers.3.eh_proj.weight"].T)
    equal(p["mtp_1"]["embedding_norm"]["scale"], t["layers.3.enorm.weight"])
    equal(p["mtp_1"]["hidden_norm"]["scale"], t["layers.3.hnorm.weight"])
    equal(p["mtp_1"]["norm"]["scale"], t["layers.3.shared_head.norm.weight"])
    equal(p["mtp_1"]["block"]["moe"]["down"][2], t["layers.3.mlp.experts.2.down_proj.weight"].T)
    equal(r["mtp_1"]["block"]["moe"]["bias"], t["layers.3.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("shards", [1, 3])
def test_through_memory_and_back(tmp_path, dtype, shards):
    tensors = folders.random_tensors(dtype=dtype)
    source = folders.write(tmp_path / "a", tensors=tensors, shards=shards)
    config, variables = load_pretrained(source)
    save_pretrained(tmp_path / "b", config, variables)
    assert folders.read(tmp_path / "b") == folders.read(source)
    again, reloaded = load_pretrained(tmp_path / "b")
    assert compare.same_model(again, config)
    same_arrays(reloaded, variables)


@pytest.mark.parametrize("kind", ["released", "mixed dtypes", "fused", "without copies", "fp8 kept"])
def test_through_our_folder_and_back(tmp_path, kind, capsys):
    """`dsv3 import` and `dsv3 export` give the same files: names, order, dtypes, bytes, configuration."""
    hf, tensors = HF | {"new_field": 3}, folders.random_tensors()
    if kind == "mixed dtypes":
        tensors = {n: v.astype(np.float32) if "layers.1." in n else v for n, v in tensors.items()}
    elif kind == "fused":
        tensors = fused(tensors)
    elif kind == "without copies":
        tensors = {n: v for n, v in tensors.items() if ".3.embed" not in n and "shared_head.head" not in n}
    elif kind == "fp8 kept":
        hf, tensors = WIDE | {"quantization_config": FP8}, quantised(folders.random_tensors(WIDE))
    source = folders.write(tmp_path / "hf", hf, tensors)
    (source / "tokenizer.json").write_text("{}")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["import", "--from", str(source), "--to", str(ours), "--keep-fp8"]) == 0
    assert ("new_field = 3: unknown field" in capsys.readouterr().out) == ("new_field" in hf)
    assert main(["export", "--from", str(ours), "--to", str(back)]) == 0
    assert {p.name for p in back.iterdir()} == {p.name for p in source.iterdir()}
    for file in source.glob("*.safetensors"):
        assert list(folders.read(back)) == list(folders.read(source))
        assert folders.read(back) == folders.read(source)
        assert (back / file.name).stat().st_size > 0
    assert json.loads((back / "config.json").read_text()) == hf
    same_arrays(load_pretrained(ours)[1], load_pretrained(source)[1])


def test_our_folder_is_an_orbax_checkpoint(tmp_path):
    """Orbax restores it alone, whole and onto a mesh, in the order of axes that the model has."""
    import orbax.checkpoint as ocp

    source = folders.write(tmp_path / "hf")
    _, variables = load_pretrained(source)
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "ours")]) == 0
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "ours" / "arrays")
    same_arrays(restored, jax.tree.map(np.asarray, variables))


def test_large_leaves_in_chunks(tmp_path, monkeypatch):
    """With chunks of a few rows, as large models have them: the same arrays, also piecewise on devices."""
    source = folders.write(tmp_path / "hf")
    _, expected = load_pretrained(source)
    monkeypatch.setattr(native, "WHOLE", 64)
    monkeypatch.setattr(native, "PIECE", 100)
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "ours")]) == 0
    assert len(list((tmp_path / "ours" / "arrays" / "params.head" / "c").rglob("0"))) > 1
    same_arrays(load_pretrained(tmp_path / "ours")[1], expected)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        same_arrays(checkpointer.restore(tmp_path / "ours" / "arrays"), jax.tree.map(np.asarray, expected))
    monkeypatch.setattr(load, "ON_HOST", 0)
    same_arrays(load_pretrained(tmp_path / "ours")[1], expected)
    assert main(["export", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")]) == 0
    assert folders.read(tmp_path / "back") == folders.read(source)


@pytest.mark.parametrize("on_host", [0, 1 << 30])
def test_onto_a_mesh(tmp_path, monkeypatch, on_host):
    monkeypatch.setattr(load, "ON_HOST", on_host)
    source = folders.write(tmp_path / "hf")
    _, expected = load_pretrained(source)
    _, found = load_pretrained(source, mesh=make_mesh(MeshConfig(data=2, expert=4)))
    same_arrays(found, expected)
    experts = found["params"]["moe_layers"]["moe"]["gate_up"]
    assert experts.addressable_shards[0].data.shape == (2, 1, 8, 16)  # 4 experts and 16 rows over 4 x 2.


def test_dtype(tmp_path):
    _, variables = load_pretrained(folders.write(tmp_path / "hf"), dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    with pytest.raises(ConversionError, match="expected nothing"):
        save_pretrained(tmp_path / "b", CONFIG, variables | {"extra": {"x": np.zeros(3)}})
    save_pretrained(tmp_path / "c", CONFIG, variables, dtype=jnp.bfloat16)
    kinds = {dtype for name, (dtype, _, _) in folders.read(tmp_path / "c").items() if "bias" not in name}
    assert kinds == {"BF16"}
    with pytest.raises(ConversionError, match="exists already"):
        save_pretrained(tmp_path / "c", CONFIG, variables)


def reference_dequantisation(values, scales):
    """DeepSeek's conversion: float32 product of each element and its block's scale, stored as bfloat16."""
    out = np.empty(values.shape, BF16)
    for i in range(values.shape[0]):
        for j in range(0, values.shape[1], 128):
            row = values[i, j : j + 128].astype(np.float32)
            out[i, j : j + 128] = (row * scales[i // 128, j // 128]).astype(BF16)
    return out


def test_fp8_is_dequantised_exactly(tmp_path):
    source = released_fp8(tmp_path / "hf")
    tensors = quantised(folders.random_tensors(WIDE))
    config, variables = load_pretrained(source)
    p = variables["params"]["moe_layers"]

    def released(name):
        return reference_dequantisation(tensors[name], tensors[name + "_scale_inv"])

    expert = released("model.layers.2.mlp.experts.1.up_proj.weight")
    np.testing.assert_array_equal(np.asarray(p["moe"]["gate_up"])[1, 1, :, 136:], expert.T)
    queries = released("model.layers.1.self_attn.q_b_proj.weight")
    np.testing.assert_array_equal(np.asarray(p["attention"]["w_uq_qr"])[0].reshape(130, -1), queries.T)
    out = released("model.layers.2.self_attn.o_proj.weight")
    np.testing.assert_array_equal(np.asarray(p["attention"]["w_o"])[1].reshape(-1, 160), out.T)
    # Kept in our folder, multiplied out when loaded: the same.
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "ours"), "--keep-fp8"]) == 0
    same_arrays(load_pretrained(tmp_path / "ours")[1], variables)
    with opened.open_source(tmp_path / "ours") as kept:
        assert kept.source.dtypes["params", "moe_layers", "moe", "gate_up"] == E4M3
    # Multiplied out by the import, and exported: bfloat16, and the configuration no longer says fp8.
    assert main(["import", "--from", str(source), "--to", str(tmp_path / "wide")]) == 0
    assert main(["export", "--from", str(tmp_path / "wide"), "--to", str(tmp_path / "back")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    same_arrays(load_pretrained(tmp_path / "back")[1], variables)
    assert config.mtp.depth == 1


def test_export_in_fp8(tmp_path):
    """Within half a step of E4M3 (2^-4 of the value, or half its smallest) in units of the block's scale."""
    tensors = folders.random_tensors(WIDE, dtype=np.float32)
    config, variables = load_pretrained(folders.write(tmp_path / "hf", WIDE, tensors))
    save_pretrained(tmp_path / "fp8", config, variables, fp8=True)
    found = folders.read(tmp_path / "fp8")
    count = 0
    for name, original in tensors.items():
        dtype, shape, data = found[name]
        linear = "_proj" in name and "eh_proj" not in name
        assert (dtype == "F8_E4M3") == linear
        if not linear:
            continue
        values = np.frombuffer(data, E4M3).reshape(shape).astype(np.float64)
        scales = np.frombuffer(found[name + "_scale_inv"][2], np.float32)
        scales = scales.reshape([-(-size // 128) for size in shape])
        scale = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]].astype(np.float64)
        half_step = np.maximum(np.abs(values) / 16, 2.0**-10)
        # The scale and the quotient are rounded to float32 before E4M3: a few 2^-24 of the value.
        assert np.all(np.abs(original / scale - values) <= half_step * (1 + 1e-5))
        count += 1
    assert count == 3 + 3 * 15 + 4 * 5  # Dense FFN; experts and shared of three layers; attention of four.
    assert load_pretrained(tmp_path / "fp8")[0] == dataclasses.replace(config)
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == FP8


def test_quantise_edges():
    """Zeros keep the scale 1, the largest value of a ragged block becomes 448."""
    matrix = np.zeros((130, 257), np.float32)
    matrix[129, 256] = -3.5
    values, scales = fp8.quantise(matrix)
    assert scales.shape == (2, 3)
    assert np.all(scales.reshape(-1)[:-1] == 1) and scales[1, 2] == np.float32(3.5 / 448)
    assert values[129, 256].astype(np.float32) == -448
    np.testing.assert_array_equal(fp8.dequantise(values, scales, np.dtype(np.float32)), matrix)


def test_released_names_are_the_expected_ones():
    """The mapping's tensors against names and shapes written out by hand."""
    assert {name: t.shape for name, t in mapping.tensors(CONFIG).items()} == folders.shapes(HF)

"""Damaged folders: every problem named in one error, nothing taken in silence."""

import copy
import dataclasses
import json
import struct
import time

import numpy as np
import pytest

from dsv3_jax.convert import native, opened, safetensors
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_folder import HFFolder
from dsv3_jax.pretrained import load_pretrained, save_pretrained
from tests.convert import folders
from tests.convert.folders import HF

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """{file: bytes} of a sound folder."""
    path = folders.write(tmp_path_factory.mktemp("sound") / "hf")
    return {p.name: p.read_bytes() for p in path.iterdir()}


def put(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def problems_of(path):
    with pytest.raises(ConversionError) as caught:
        HFFolder(path)
    return caught.value.problems


def test_every_problem_in_one_error(pristine, tmp_path):
    files = dict(pristine)
    header, body = header_of(files[SHARD])
    names = [name for name in header if name != "__metadata__"]
    wrong_shape, extra = names[0], names[1]
    header[wrong_shape]["shape"] = header[wrong_shape]["shape"][::-1] + [1]
    header["left.over"] = header.pop(extra)
    files[SHARD] = with_header(header, body)
    files["model-00001-of-00003.safetensors"] = files["model-00001-of-00003.safetensors"][:-3]
    config = json.loads(files["config.json"]) | {"hidden_act": "gelu", "n_group": 3}
    files["config.json"] = json.dumps(config).encode()
    found = "\n".join(problems_of(put(tmp_path, files)))
    for part in ("hidden_act = 'gelu'", "truncated", f"{extra} is not in {SHARD}", "left.over"):
        assert part in found
    files["config.json"] = pristine["config.json"]
    files["model-00001-of-00003.safetensors"] = pristine["model-00001-of-00003.safetensors"]
    found = problems_of(put(tmp_path, files))
    assert any(p.startswith(f"{wrong_shape}: ") and "config.json makes it" in p for p in found)
    assert any(p.startswith(f"{extra}: missing") for p in found)
    assert any(p.startswith("left.over: ") and "no part of this model" in p for p in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 18}, "config.json makes it"),
        ({"num_hidden_layers": 4}, "layers.3.eh_proj.weight: [16, 32] is no part"),
        ({"num_hidden_layers": 2}, "no part of this model"),
        ({"num_nextn_predict_layers": 2}, "missing"),
        ({"num_nextn_predict_layers": 0}, "no part of this model"),
        ({"n_routed_experts": 6}, "missing"),
        ({"q_lora_rank": None}, "q_proj.weight: missing"),
        ({"tie_word_embeddings": True}, "differs from model.embed_tokens.weight"),
        ({"model_type": "mixtral"}, "model_type = 'mixtral': supported are"),
        ({"attention_bias": True}, "attention_bias = True: only False is supported"),
        ({"topk_method": "noaux"}, "topk_method = 'noaux': unsupported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type = 'linear'"),
        ({"rope_scaling": HF["rope_scaling"] | {"factor": "4"}}, "factor = '4': must be a number"),
        ({"num_attention_heads": "2"}, "num_attention_heads = '2': must be a whole number"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
        ({"topk_group": 5}, "topk_groups = 5"),
    ],
)
def test_config_against_tensors(pristine, tmp_path, change, says):
    files = dict(pristine) | {"config.json": json.dumps(HF | change).encode()}
    assert any(says in problem for problem in problems_of(put(tmp_path, files)))


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert any("is a pickle, which runs code when it is read" in p for p in problems_of(tmp_path))


# ------------------------------------------------------------------------------------------- the fuzz


def corruptions(pristine, rng):
    """(what, files, must be refused) without end; the last is False where the change may mean nothing."""
    shards = [name for name in pristine if name.endswith(".safetensors")]
    while True:
        files, kind = dict(pristine), rng.integers(14)
        shard = shards[rng.integers(len(shards))]
        data = files[shard]
        header, body = header_of(data)
        names = [name for name in header if name != "__metadata__"]
        name = names[rng.integers(len(names))]
        entry = header[name]
        index = json.loads(files[INDEX])
        certain = True
        if kind == 0:
            files[shard] = data[: rng.integers(len(data))]
        elif kind == 1:
            files[shard] = data + bytes(rng.integers(1, 40))
        elif kind == 2:
            del files[shard]
        elif kind == 3:  # A byte of the header: of its length, a name, a shape, an offset, a space.
            at = int(rng.integers(8 + len(json.dumps(header))))
            changed = bytearray(data)
            changed[at] ^= 1 << rng.integers(8)
            files[shard], certain = bytes(changed), False
        elif kind == 4:
            del header[name]
            files[shard] = with_header(header, body)
        elif kind == 5:
            entry["dtype"] = [k for k in safetensors.DTYPES if k != entry["dtype"]][rng.integers(14)]
            files[shard] = with_header(header, body)
        elif kind == 6:
            axis = rng.integers(len(entry["shape"]))
            entry["shape"][axis] = int(max(0, entry["shape"][axis] + rng.choice([-1, 1, 7])))
            files[shard] = with_header(header, body)
        elif kind == 7:
            entry["data_offsets"][rng.integers(2)] += int(rng.choice([-4, -1, 1, 2, 1 << 40]))
            files[shard] = with_header(header, body)
        elif kind == 8:
            header[name + "x"] = header.pop(name)
            files[shard] = with_header(header, body)
        elif kind == 9:
            del index["weight_map"][name]
            files[INDEX] = json.dumps(index).encode()
        elif kind == 10:
            others = [other for other in shards if other != shard]
            index["weight_map"][name] = str(rng.choice([*others, "no_such.safetensors", "../" + shard]))
            files[INDEX] = json.dumps(index).encode()
        elif kind == 11:
            victim = str(rng.choice([INDEX, "config.json"]))
            files[victim] = files[victim][: rng.integers(len(files[victim]))]
        elif kind == 12:  # A shape's field of the configuration, by a value that some model could have.
            fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "kv_lora_rank"]
            fields += [
                "moe_intermediate_size",
                "n_routed_experts",
                "first_k_dense_replace",
                "num_attention_heads",
            ]
            field = str(rng.choice(fields))
            files["config.json"] = json.dumps(HF | {field: HF[field] + int(rng.choice([1, 2]))}).encode()
        else:  # The same tensor twice.
            other = shards[(shards.index(shard) + 1) % len(shards)]
            header, body = header_of(files[other])
            entry = {"dtype": "BF16", "shape": [1], "data_offsets": [len(body), len(body) + 2]}
            files[other] = with_header(header | {name: entry}, body + b"\0\0")
        yield f"{kind}: {shard} {name}", files, certain


def test_fuzz(pristine, tmp_path):
    """Of over 300 corruptions none is accepted in silence and none ends in any other exception.

    A flipped bit of a header may change nothing that is read (a space, the free-form metadata): then what is
    read must be the same. Contents of a Hugging Face folder carry no checksum, so flips there cannot be seen.
    """
    refused, rng = 0, np.random.default_rng(0)
    folder = put(tmp_path / "hf", pristine)
    with opened.open_source(folder) as sound:
        expected = folders.everything(sound.source)
    start = time.monotonic()
    for what, files, certain in corruptions(pristine, rng):
        put(folder, files)
        try:
            found = HFFolder(folder)
        except ConversionError as error:
            assert error.problems and all(error.problems), what
            refused += 1
        else:
            assert not certain, f"accepted: {what}"
            assert folders.everything(found) == expected, f"accepted and different: {what}"
            found.close()
        if refused >= 320:
            break
    assert time.monotonic() - start < 120


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """{file: bytes} of a folder of ours."""
    path = tmp_path_factory.mktemp("ours")
    with opened.open_source(folders.write(path / "hf")) as source:
        native.write(source.source, path / "ours", source.huggingface)
    return {p.relative_to(path / "ours"): p.read_bytes() for p in (path / "ours").rglob("*") if p.is_file()}


def test_fuzz_of_our_folder(ours, tmp_path):
    """Any flipped bit, missing, extra or truncated file: our folder has a checksum for each."""
    rng, names = np.random.default_rng(1), sorted(ours)
    for name, data in ours.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with opened.open_source(tmp_path) as source:
        assert folders.everything(source.source)
    for i in range(150):
        name = names[rng.integers(len(names))]
        data, file = ours[name], tmp_path / name
        if i % 3 == 0:
            file.write_bytes(data[: rng.integers(len(data))])
        elif i % 10 == 1:
            file.unlink()
        else:
            changed = bytearray(data)
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
            file.write_bytes(bytes(changed))
        with pytest.raises(ConversionError), opened.open_source(tmp_path) as source:
            folders.everything(source.source)
        file.write_bytes(data)
    (tmp_path / "arrays" / "stray").write_text("x")
    with pytest.raises(ConversionError, match="arrays/stray: no part of it"), opened.open_source(tmp_path):
        pass


def test_what_no_class_expresses_is_refused(tmp_path):
    config, variables = load_pretrained(folders.write(tmp_path / "hf"))
    odd = dataclasses.replace(config, moe=dataclasses.replace(config.moe, gate="softmax"))
    with pytest.raises(ConversionError, match="is not zero, and this class of models has no router bias"):
        save_pretrained(tmp_path / "out", odd, variables)
    odd = dataclasses.replace(config, attention=dataclasses.replace(config.attention, latent_norm_eps=1e-5))
    with pytest.raises(ConversionError, match="latent_norm_eps = 1e-05"):
        save_pretrained(tmp_path / "out", odd, variables)


def test_the_library_reads_the_same(tmp_path):
    """Our parser and writer against the safetensors package."""
    numpy_files = pytest.importorskip("safetensors.numpy")
    source = folders.write(tmp_path / "hf", tensors=folders.random_tensors(dtype=np.float32), shards=1)
    config, variables = load_pretrained(source)
    save_pretrained(tmp_path / "out", config, variables)
    ours = numpy_files.load_file(tmp_path / "out" / "model.safetensors")
    theirs = folders.random_tensors(dtype=np.float32)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    numpy_files.save_file(copy.deepcopy(theirs), source / "model.safetensors")
    assert folders.equal(source, tmp_path / "out")

"""Conversion of a large checkpoint against copying its files, in one run on one disk.

    python benchmarks/convert.py --workdir /tmp/convert [--gigabytes 8] [--json FILE]

A synthetic checkpoint in bfloat16, sharded, of the shape of Moonlight's layers, is copied, imported and
exported. Files leave the page cache before each phase, each ends when everything is on the disk, and copying
is timed before and after; the ratio is to the faster of the two. A conversion is the whole command, from the
start of the interpreter to its end, and its memory the peak of the process.
"""

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SHARD = 1 << 30
HF = {
    "model_type": "deepseek_v3",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "rope_theta": 50000.0,
    "max_position_embeddings": 8192,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}


def synthesise(path: Path, gigabytes: float) -> None:
    """Writes the checkpoint: random bytes that are finite bfloat16 numbers."""
    sys.path.insert(0, str(ROOT))
    from dsv3_jax.convert import hf_config, mapping

    layers = 2
    while True:
        hf = HF | {"num_hidden_layers": layers}
        tensors = mapping.tensors(hf_config.from_hf(hf).config)
        if 2 * sum(math.prod(t.shape) for t in tensors.values()) >= gigabytes * 1e9:
            break
        layers += 1
    groups, size = [{}], 0
    for name, tensor in tensors.items():
        wide = 4 if tensor.leaf[0] == "router" else 2
        bytes_ = wide * math.prod(tensor.shape)
        if size + bytes_ > SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = (tensor.shape, bytes_, wide)
        size += bytes_
    pool = np.random.default_rng(0).integers(0, 1 << 16, 1 << 24, np.uint16) & 0xBFFF  # Magnitudes below 2.
    path.mkdir(parents=True)
    where = {}
    for i, group in enumerate(groups, start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        header, end = {}, 0
        for name, (shape, bytes_, wide) in group.items():
            kind = "F32" if wide == 4 else "BF16"
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + bytes_]}
            end += bytes_
            where[name] = file
        text = json.dumps(header).encode()
        with (path / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _, bytes_, _ in group.values():
                for start in range(0, bytes_, pool.nbytes):
                    out.write(memoryview(pool).cast("B")[: min(pool.nbytes, bytes_ - start)])
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps(hf))
    os.sync()


def forget(path: Path) -> None:
    """Takes the files of a folder out of the page cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files of a folder, on the disk."""
    forget(source)
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    os.sync()
    return seconds


def convert(command: str, source: Path, target: Path) -> dict[str, float]:
    """Runs `dsv3 import` or `dsv3 export`."""
    forget(source)
    arguments = ["-m", "dsv3_jax.cli", command, "--from", str(source), "--to", str(target)]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"dsv3 {command} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": usage.ru_maxrss * 1024}


def run(workdir: Path, gigabytes: float) -> dict:
    """All phases; prints a line for each."""
    workdir.mkdir(parents=True)
    free, needed = shutil.disk_usage(workdir).free, 3.2e9 * gigabytes
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.0f} GB are needed in {workdir}, {free / 1e9:.0f} GB are free")
    source, ours, back = workdir / "hf", workdir / "ours", workdir / "back"
    synthesise(source, gigabytes)
    size = size_of(source)
    result: dict = {"bytes": size, "files": len(list(source.glob("*.safetensors"))), "cpus": os.cpu_count()}
    copies = [copy(source, workdir / "copy")]
    conversions = {"import": convert("import", source, ours), "export": convert("export", ours, back)}
    for file in source.glob("*.safetensors"):  # They are the same tensors in the same order.
        if tail(file) != tail(back / file.name):
            raise SystemExit(f"{file.name} came back different")
    shutil.rmtree(ours)
    shutil.rmtree(back)
    copies.append(copy(source, workdir / "copy"))
    result["copy_seconds"] = copies
    rate = size / 1e9 / min(copies)
    print(f"{size / 1e9:.2f} GB; copied in {copies[0]:.1f} s and {copies[1]:.1f} s, {rate:.2f} GB/s")
    for name, found in conversions.items():
        found["of_copy_speed"] = min(copies) / found["seconds"]
        result[name] = found
        print(
            f"{name}: {found['seconds']:.1f} s, {100 * found['of_copy_speed']:.0f}% of copying; "
            f"{found['cpu_seconds']:.1f} s of CPU, peak memory {found['peak_bytes'] / 2**30:.2f} GiB"
        )
    return result


def tail(file: Path) -> bytes:
    """The last bytes of a file, behind any difference of headers."""
    with file.open("rb") as handle:
        handle.seek(-min(1 << 24, file.stat().st_size // 2), os.SEEK_END)
        return handle.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="must not exist; removed at the end")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="where to keep the result")
    args = parser.parse_args()
    try:
        result = run(args.workdir, args.gigabytes)
    finally:
        shutil.rmtree(args.workdir, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

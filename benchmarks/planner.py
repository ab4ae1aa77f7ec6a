"""The planner's memory beside the TPU compiler's own analysis, and beside what was measured on the card.

    PYTHONPATH=. python benchmarks/planner.py [--only NAME ...] [--out benchmarks/results/planner.json]

Needs libtpu and no TPU. Each program is compiled in a process of its own, whose CPU seconds and peak memory
are kept. Programs that are not compiled this time keep their entry in `--out`; their plans are made anew.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from dsv3_jax.cli._shared import load_config
from dsv3_jax.config_checks import typed
from dsv3_jax.config_reading import override
from dsv3_jax.planning import compiled, memory, parse_topology, search
from dsv3_jax.planning.shapes import Split, split_of

RESULTS = Path(__file__).parent / "results"
GIB = 2.0**30


class Case(NamedTuple):
    """A program to compile."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...] = ()


CASES = (
    Case(
        "tiny_dense",
        "configs/tiny.py",
        "v5e:2x4",
        (
            "mesh.data=8",
            "mesh.sharding=zero1",
            "model.moe.n_dense_layers=3",
            "model.mtp.depth=0",
            "train.precision=bf16",
            "train.seq_len=1024",
            "train.batch_size=64",
            "train.loss_chunk=256",
        ),
    ),
    Case(
        "tiny_experts",
        "configs/tiny.py",
        "v6e:2x2",
        (
            "mesh.data=2",
            "mesh.expert=2",
            "mesh.sharding=fsdp",
            "model.mtp.depth=0",
            "train.precision=bf16",
            "train.remat=v3",
            "train.seq_len=1024",
            "train.batch_size=32",
        ),
    ),
    Case(
        "proxy_300m",
        "configs/proxy_300m.py",
        "v6e:2x2",
        ("mesh.data=2", "mesh.expert=2", "mesh.sharding=fsdp"),
    ),
    Case("small_gpu", "configs/small_gpu.py", "v5p:2x2x1", ("mesh.data=4", "mesh.sharding=fsdp")),
    Case("llm_7b", "configs/llm_7b.py", "v6e:4x4", ("train.batch_size=32", "train.micro_batch_size=16")),
    Case(
        "v2_lite",
        "configs/v2_lite.py",
        "v5p:2x2x4",
        ("train.batch_size=64", "train.micro_batch_size=32"),
    ),
    Case("moe_16b", "configs/moe_16b.py", "v6e:4x8", ("train.batch_size=64", "train.micro_batch_size=32")),
    Case("llm_67b", "configs/llm_67b.py", "v5p:4x4x4", ("train.batch_size=128", "train.micro_batch_size=64")),
    Case("v3_671b", "configs/v3_671b.py", "v5p:8x8x16"),
)
# `dsv3 plan --search`: what it ranks first is compiled.
SEARCH = Case("proxy_300m, the best of a search", "configs/proxy_300m.py", "v6e:2x2")


def config_of(case: Case):
    """The typed configuration of a case."""
    tree = load_config(Path(__file__).parents[1] / case.config)
    return typed(tree, override(tree, case.overrides))


def search_here() -> dict:
    """The first of a search, planned for its own mesh and compiled."""
    best, tried = search.search(config_of(SEARCH), parse_topology(SEARCH.topology))
    train, mesh = best[0].config.train, best[0].config.mesh
    overrides = [f"train.{name}={getattr(train, name)}" for name in ("remat", "micro_batch_size")]
    overrides += [f"mesh.{name}={getattr(mesh, name)}" for name in ("data", "expert", "sharding")]
    case = SEARCH._replace(overrides=tuple(overrides))
    ranked = {"tried": tried, "ranked_at_gib": best[0].used.total / GIB}
    entry = case._asdict() | ranked | compile_here(case) | planned(case)
    return entry | {"off": entry["planned_gib"] / entry["compiler_gib"] - 1}


def compile_here(case: Case) -> dict:
    """What the compiler says, and what it took."""
    started = time.perf_counter()
    found = compiled.compile_step(config_of(case), parse_topology(case.topology))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "compiler_gib": found.peak / GIB,
        "compiler_state_gib": found.state / GIB,
        "compiler_temporaries_gib": found.temporaries / GIB,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "host_gib": round(used.ru_maxrss / 2**20, 2),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }


def planned(case: Case) -> dict:
    """The analytical model of a case."""
    config, topology = config_of(case), parse_topology(case.topology)
    used = memory.of_step(config, split_of(config, topology), "tpu")
    return {"planned_gib": used.total / GIB, "by_kind_gib": {k: v / GIB for k, v in used._asdict().items()}}


def measured() -> list[dict]:
    """What ran on one H200, beside its plan."""
    fp8 = json.loads((RESULTS / "fp8_train.json").read_text())["results"]
    rows = [(p, fp8[p]["state_gib"] + fp8[p]["temporary_gib"], "fp8_train.json") for p in ("bf16", "fp8")]
    rows.append(
        ("bf16", json.loads((RESULTS / "small_gpu.json").read_text())["peak_memory_gib"], "small_gpu.json")
    )
    found = []
    for precision, peak, source in rows:
        case = Case("", "configs/small_gpu.py", "h200:1", (f"train.precision={precision}",))
        plan = memory.of_step(config_of(case), Split(1, 1, "replicated"), "gpu").total / GIB
        found.append({"precision": precision, "measured_gib": peak, "planned_gib": plan, "source": source})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS / "planner.json")
    parser.add_argument("--compile", metavar="NAME", help="compile one here and print it")
    parser.add_argument("--search", action="store_true", help="compile what `dsv3 plan --search` finds best")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"programs": []}
    if arguments.search:
        found = search_here()
        print(f"{found['name']}: {' '.join(found['overrides'])}: {found['compiler_gib']:.2f} GiB", end="")
        print(f"   {found['off']:+.1%}, of {found['tried']} tried")
        arguments.out.write_text(json.dumps(known | {"search": found}, indent=1) + "\n")
        return
    if arguments.compile:
        print(json.dumps(compile_here(next(c for c in CASES if c.name == arguments.compile))))
        return
    programs = {entry["name"]: entry for entry in known["programs"]}
    for case in CASES:
        entry = programs.get(case.name, {}) | case._asdict()
        if case.name in arguments.only:
            command = [sys.executable, __file__, "--compile", case.name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            entry |= json.loads(done.stdout.splitlines()[-1])
        if "compiler_gib" not in entry:
            continue
        entry |= planned(case)
        entry["off"] = entry["planned_gib"] / entry["compiler_gib"] - 1
        programs[case.name] = entry
        print(f"{case.name:12} {case.topology:12} {entry['compiler_gib']:8.3f} GiB   {entry['off']:+.1%}")
    rows = measured()
    for row in rows:
        print(f"H200 {row['precision']}: {row['measured_gib']:.2f} GiB, planned {row['planned_gib']:.2f}")
    found = known | {"programs": list(programs.values()), "measured": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

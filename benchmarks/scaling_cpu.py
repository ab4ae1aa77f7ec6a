"""What a training step costs on CPU as experts grow and as layers grow.

    PYTHONPATH=. python benchmarks/scaling_cpu.py [experts] [depth] [--tokens N] [--rounds 5] [--out FILE]

experts: step time at 8, 64 and 256 experts with the same active parameters (top-2 of experts of one
width); the optimizer, which passes over all parameters, is timed apart. Its cost and that of reading and
writing each expert's weights once are shared by the tokens of a step, of which DeepSeek-V3 has 63M for 256
experts: so `--tokens` matters.

depth: compile time and the compiler's own count of memory at 4 and 32 layers, with everything inside a
block computed again in the backward pass (`remat="full"`), and without.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from benchmarks import cpu
from benchmarks.train_cpu import TINY, Ours, random_batch, run_config
from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import optimizer
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.state import abstract_state, parameter_count
from dsv3_jax.training.step import Schedules, make_train_step
from dsv3_jax.training.throughput import active_parameters

EXPERTS = (8, 64, 256)
TOKENS = (8192, 32768)
LAYERS = (4, 32)
SEQ = 256


def with_experts(n: int, sequences: int) -> Config:
    """The tiny model with `n` experts, and V3's balance loss, whose cost is part of the question."""
    moe = dataclasses.replace(TINY.moe, n_experts=n, sequence_loss=1e-4)
    return run_config(dataclasses.replace(TINY, moe=moe), sequences, SEQ)


class OptimizerAlone:
    """Norm, clipping and AdamW on gradients that are at hand."""

    def __init__(self, config: Config, state: Any):
        o = config.optimizer

        def update(params, moments, grads):
            _, clip = optimizer.norm_and_clip_scale(grads, o.clip_norm)
            return optimizer.adamw_update(params, grads, moments, o.peak_lr, clip, o)

        self._update = jax.jit(update, donate_argnums=(0, 1))
        copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))
        self.params, self.moments, self.grads = copy(state.params), copy(state.optimizer), copy(state.params)

    def step(self) -> None:
        self.params, self.moments = self._update(self.params, self.moments, self.grads)
        jax.block_until_ready(self.params)


def experts_rows(rounds: int, tokens: int) -> list[dict[str, Any]]:
    """One row a number of experts, timed in turns, each with its cost over that of the fewest."""
    sequences = tokens // SEQ
    rivals, rows = {}, {}
    for n in EXPERTS:
        config = with_experts(n, sequences)
        ours = Ours(config, random_batch(config.model.vocab_size, sequences, SEQ))
        ours.step()
        rows[n] = {
            "experts": n,
            "parameters": parameter_count(ours.state.params),
            "active_parameters": active_parameters(config.model, ours.state.params),
            "tokens": sequences * SEQ,
        }
        rivals[f"step {n}"] = ours.step
        rivals[f"optimizer {n}"] = OptimizerAlone(config, ours.state).step
    times = cpu.alternate(rivals, rounds=rounds)
    first = EXPERTS[0]
    for n, row in rows.items():
        step, alone = times[f"step {n}"], times[f"optimizer {n}"]
        step1, alone1 = times[f"step {first}"], times[f"optimizer {first}"]
        row["step"], row["optimizer"] = step._asdict(), alone._asdict()
        row["cost"] = step.wall / step1.wall
        row["cost_cpu_seconds"] = step.cpu / step1.cpu
        row["cost_without_optimizer_cpu_seconds"] = (step.cpu - alone.cpu) / (step1.cpu - alone1.cpu)
    return list(rows.values())


def compiled(layers: int, remat: str) -> dict[str, Any]:
    """Compile seconds and memory of one training step at a depth; nothing is run."""
    model = dataclasses.replace(TINY, n_layers=layers)
    config = run_config(model, 8, SEQ)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))
    mesh = make_mesh(config.mesh)
    state = abstract_state(config, mesh)
    batch = jax.eval_shape(lambda: random_batch(model.vocab_size, 8, SEQ))
    step = make_train_step(config, mesh)
    start, start_cpu = time.perf_counter(), time.process_time()
    lowered = step.lower(state, batch, 1, Schedules(1e-3, 0.0, 0.0))
    program = lowered.compile()
    found = {
        "compile_seconds": time.perf_counter() - start,
        "compile_cpu_seconds": time.process_time() - start_cpu,
    }
    memory = program.memory_analysis()
    block_input = 4 * 8 * SEQ * model.d_model
    return found | {
        "layers": layers,
        "remat": remat,
        "parameter_bytes": 4 * parameter_count(state.params),
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "block_input_bytes": block_input,
    }


def depth_rows() -> list[dict[str, Any]]:
    """Rows of `compiled`, and for each policy what a further layer adds beyond its gradients."""
    compiled(2, "full")  # What only the first compilation pays.
    rows = []
    for remat in ("full", "none"):
        few, many = (compiled(layers, remat) for layers in LAYERS)
        added = many["layers"] - few["layers"]
        grown = many["temporary_bytes"] - few["temporary_bytes"]
        gradients = many["parameter_bytes"] - few["parameter_bytes"]
        many["bytes_a_layer"] = grown / added
        many["bytes_a_layer_beyond_gradients"] = (grown - gradients) / added
        many["block_inputs_a_layer_beyond_gradients"] = (
            (grown - gradients) / added / many["block_input_bytes"]
        )
        rows += [few, many]
    return rows


def experts_line(row: dict[str, Any]) -> str:
    """A row of `experts_rows` as text."""
    step, alone = row["step"], row["optimizer"]
    return (
        f"{row['tokens']:6d} tokens {row['experts']:4d} experts {row['parameters'] / 1e6:6.2f}M "
        f"({row['active_parameters'] / 1e6:.2f}M active)  "
        f"step {step['wall']:.2f} s, CPU {step['cpu']:.2f} s  "
        f"optimizer {alone['wall']:.3f} s, CPU {alone['cpu']:.3f} s  "
        f"cost {row['cost']:.2f}, by CPU seconds {row['cost_cpu_seconds']:.2f}, "
        f"without the optimizer {row['cost_without_optimizer_cpu_seconds']:.2f}"
    )


def depth_line(row: dict[str, Any]) -> str:
    """A row of `depth_rows` as text."""
    text = (
        f"{row['layers']:3d} layers, remat {row['remat']:4s}  "
        f"compile {row['compile_seconds']:.1f} s, CPU {row['compile_cpu_seconds']:.1f} s  "
        f"parameters {row['parameter_bytes'] / 2**20:.1f} MiB  "
        f"temporaries {row['temporary_bytes'] / 2**20:.1f} MiB"
    )
    if "block_inputs_a_layer_beyond_gradients" in row:
        beyond = row["block_inputs_a_layer_beyond_gradients"]
        text += f"; a layer adds its gradients and {beyond:.2f} block inputs"
    return text


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["experts", "depth"], help="both by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, action="append", help="a step; 8192 and 32768 by default")
    parser.add_argument("--system-allocator", action="store_true", help="leave the C library as it is")
    parser.add_argument("--out", help="where to write JSON")
    arguments = parser.parse_args(argv)
    kept = not arguments.system_allocator and keep_freed_memory()
    what = arguments.what or ["experts", "depth"]
    rows = []
    if "experts" in what:
        for tokens in arguments.tokens or TOKENS:
            for row in experts_rows(arguments.rounds, tokens):
                print(experts_line(row), flush=True)
                rows.append(row)
    if "depth" in what:
        for row in depth_rows():
            print(depth_line(row), flush=True)
            rows.append(row)
    if arguments.out:
        cpu.write(arguments.out, rows, freed_memory_kept=kept)
    return rows


if __name__ == "__main__":
    main()

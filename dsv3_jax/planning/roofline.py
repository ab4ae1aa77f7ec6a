"""The least time of a training step: the slowest of its units, if everything else hides behind it."""

from typing import Any, NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.planning import flops, memory, traffic
from dsv3_jax.planning.hardware import Topology
from dsv3_jax.planning.shapes import Split, parts


class Roofline(NamedTuple):
    """Seconds of a step on one device, unit by unit."""

    seconds: dict[str, float]
    model_flops: float  # Of the whole step, all devices.
    peak: float  # bf16 FLOP/s of all devices: what MFU is measured against.

    @property
    def step(self) -> float:
        """Of the slowest unit."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """The slowest unit."""
        return max(self.seconds, key=lambda unit: self.seconds[unit])

    @property
    def mfu(self) -> float:
        """The highest model FLOPs utilisation that the step can reach."""
        return self.model_flops / (self.peak * self.step)


def of_step(
    config: Config, split: Split, topology: Topology, params: Any, moved: list[traffic.Transfer]
) -> Roofline:
    """The units' times: products at the peak of their precision, HBM, and each link with what it carries."""
    chip, train = topology.chip, config.train
    tokens = train.batch_size * train.seq_len
    counted = flops.of_training(config, params, chip.platform)
    per_device = tokens / split.n_devices
    compute = per_device * ((counted.hardware - counted.fp8) / chip.bf16 + counted.fp8 / chip.fp8)
    seconds = {
        "compute": compute,
        "HBM": hbm_bytes(config, split) / chip.hbm_bandwidth,
        chip.near_name: sum(t.near * t.hops for t in moved) / chip.near,
    }
    far = sum(t.far for t in moved)
    if far:
        seconds["network"] = far / chip.far
    return Roofline(seconds, tokens * counted.model, chip.bf16 * split.n_devices)


def hbm_bytes(config: Config, split: Split) -> float:
    """Bytes that a device's HBM moves in a step, each product reading its operands once.

    Weights are read for each of the three products of a micro-batch, AdamW reads and writes what it owns,
    and a layer reads and writes the activations counted in `_elements` forward, twice that backward.
    """
    train = config.train
    width = 4 if train.precision == "fp32" else 2
    n_micro = train.batch_size // (train.micro_batch_size or train.batch_size)
    held = parts(config, split)
    whole = sum(part.whole for part in held.values())
    own = sum(part.moments for part in held.values())
    moment = 4 if config.optimizer.moment_dtype == "float32" else 2
    weights = n_micro * whole * (4 + 3 * width + 4)  # Read to cast, then used; the gradient is written.
    update = own * (4 + 8 + 4 * moment)
    activations = 3 * n_micro * memory.tokens_of(config, split) * _elements(config) * width
    return weights + update + activations


def _elements(config: Config) -> float:
    """Numbers that the layers read and write for a token, forward."""
    model, a, moe = config.model, config.model.attention, config.model.moe
    dense, sparse = flops.layers(model)
    qk, v = flops.widths(a)
    attention = 8 * model.d_model + 2 * a.n_heads * (2 * qk + 2 * v) + 2 * (a.q_lora_rank + a.kv_lora_rank)
    ffn = 2 * model.d_model + 6 * model.d_ff
    shared = 2 * model.d_model + 6 * moe.n_shared * moe.d_ff_expert
    routed = moe.top_k * (5 * model.d_model + 6 * moe.d_ff_expert)
    return (dense + sparse) * attention + dense * ffn + sparse * (shared + routed)

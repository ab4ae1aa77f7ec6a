"""From a ConfigDict to a valid `Config`: every problem found before any compute, all in one message."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dsv3_jax import mesh_checks
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config_reading import ConfigError, Problem, convert
from dsv3_jax.pipeline.schedules import NAMES as SCHEDULES
from dsv3_jax.pipeline.settings import problems as pipeline_problems


def typed(
    tree: Any,
    problems: Iterable[Problem] = (),
    further: Callable[[Config], Iterable[Problem]] = lambda config: (),
) -> Config:
    """The frozen `Config` of a ConfigDict (or nested dict), checked.

    Args:
      tree: sections and fields; missing ones take their defaults.
      problems: found before, to be reported together with those found here.
      further: more checks of a configuration: of the machine, of the data.

    Raises:
      ConfigError: with every problem: unknown names, wrong types, impossible or contradictory values.
    """
    found = list(problems)
    wrong_types: list[Problem] = []
    config = convert(Config, tree, "", found, wrong_types)
    found += wrong_types
    if not wrong_types:  # Relations mean nothing where a field's value is not even known.
        found += [*check(config), *further(config)]
    if found:
        raise ConfigError(problem for i, problem in enumerate(found) if problem not in found[:i])
    return config


def check(config: Config) -> list[Problem]:
    """Everything wrong with the values of a configuration, whatever the machine."""
    report = _Report(config)
    _check_choices(report)
    _check_ranges(report)
    _check_attention(report, config.model)
    if config.model.moe.n_dense_layers < config.model.n_layers:
        _check_moe(report, config.model)
    _check_training(report, config)
    return report.problems


class _Report:
    """Collects problems; fields are named by their dotted path."""

    def __init__(self, config: Config):
        self.config = config
        self.problems: list[Problem] = []

    def value(self, path: str) -> Any:
        node: Any = self.config
        for name in path.split("."):
            node = getattr(node, name)
        return node

    def require(self, condition: bool, path: str, fix: str) -> None:
        if not condition:
            self.problems.append(Problem(path, self.value(path), fix))


_CHOICES = {
    "model.attention.kind": ("mla", "mha", "gqa", "mqa"),
    "model.moe.group_score": ("top2_sum", "max"),
    "model.moe.gate": ("sigmoid", "softmax"),
    "model.mtp.kind": ("sequential", "parallel"),
    "optimizer.schedule": ("constant", "cosine", "multi_step", "v2", "v3"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "optimizer.memory": ("device", "host"),
    "train.precision": ("bf16", "fp32", "fp8"),
    "train.remat": ("none", "full", "dots", "v3"),
    "train.ema_memory": ("device", "host"),
    "train.pipeline": ("", *SCHEDULES),
    "fp8.activation_scales": ("tile", "tensor"),
    "fp8.weight_scales": ("block", "tensor"),
    "fp8.gradient_dtype": ("e4m3", "e5m2"),
    "fp8.attention_output": ("fp8", "e5m6", "bf16"),
    "fp8.swiglu_input": ("fp8", "bf16"),
    "mesh.sharding": ("replicated", "zero1", "fsdp"),
    "mesh.transport": ("auto", "dense", "ragged", "remote", "gather"),
}

_MINIMUM = {
    "model": {"vocab_size": 2, "d_model": 1, "n_layers": 1, "d_ff": 1, "max_seq_len": 1},
    "model.attention": {"n_heads": 1, "q_lora_rank": 0},
    "model.rope": {"yarn_factor": 1, "yarn_original_len": 1},
    "model.moe": {"n_dense_layers": 0, "n_shared": 0, "bias_speed": 0},
    "model.mtp": {"depth": 0, "loss_weight": 0, "final_loss_weight": 0},
    "data": {"read_threads": 0},
    "optimizer": {"peak_lr": 0, "weight_decay": 0, "clip_norm": 0, "warmup_steps": 0, "final_ratio": 0},
    "train": {
        "steps": 1,
        "seq_len": 1,
        "batch_size": 1,
        "micro_batch_size": 0,
        "ramp_start_batch": 0,
        "token_budget": 0,
        "seed": 0,
        "loss_chunk": 0,
        "log_every": 1,
        "eval_every": 0,
        "eval_batches": 1,
        "max_bad_steps": 1,
        "pipeline_chunks": 1,
        "spike_factor": 1,
        "sample_tokens": 0,
    },
    "checkpoint": {"every": 0, "keep_last": 1, "keep_best": 0},
}
_LOSSES = ("sequence_loss", "batch_loss", "expert_loss", "device_loss", "communication_loss")
_FRACTIONS = (
    "model.moe.bias_until",
    "model.moe.bias_final_ratio",
    "model.mtp.loss_weight_until",
    "train.ramp_until",
)
_BELOW_ONE = ("optimizer.b1", "optimizer.b2", "train.ema_decay")
_POSITIVE = (
    "model.norm_eps",
    "model.attention.latent_norm_eps",
    "model.init_std",
    "optimizer.eps",
    "mesh.dispatch_slack",
)


# Fields that name an implementation, and the op of `pallas_kernels` whose it is.
_KERNELS = {
    "model.attention.implementation": "mla_attention",
    "model.moe.implementation": "grouped_matmul",
    "fp8.implementation": "quantize_rows",
}


def _check_choices(report: _Report) -> None:
    choices = dict(_CHOICES)
    for path, op in _KERNELS.items():
        if report.value(path) != "auto":  # The kernels, which import JAX, name the others.
            import pallas_kernels

            choices[path] = ("auto", *implementations_of(getattr(pallas_kernels, op)))
    for path, allowed in choices.items():
        report.require(report.value(path) in allowed, path, f"choose one of {', '.join(allowed)}")


def implementations_of(op: Any) -> tuple[str, ...]:
    """The names that `implementation=` of an op of `pallas_kernels` takes, besides "auto"."""
    import sys

    return tuple(sys.modules[op.__module__].IMPLEMENTATIONS)


def _check_ranges(report: _Report) -> None:
    for section, fields in _MINIMUM.items():
        for name, least in fields.items():
            path = f"{section}.{name}"
            report.require(report.value(path) >= least, path, f"must be at least {least}")
    for name in _LOSSES:
        path = f"model.moe.{name}"
        report.require(report.value(path) >= 0, path, "must be at least 0")
    for path in _FRACTIONS:
        report.require(0 <= report.value(path) <= 1, path, "is a fraction of the token budget, from 0 to 1")
    for path in _BELOW_ONE:
        report.require(0 <= report.value(path) < 1, path, "must be at least 0 and below 1")
    for path in _POSITIVE:
        report.require(report.value(path) > 0, path, "must be above 0")


def _check_attention(report: _Report, model: ModelConfig) -> None:
    attention, at = model.attention, "model.attention."
    if attention.kind == "mla":
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            report.require(getattr(attention, name) >= 1, at + name, "must be at least 1")
        even = attention.qk_rope_head_dim % 2 == 0
        report.require(even, at + "qk_rope_head_dim", "RoPE turns pairs, so it must be even")
        for name in ("q_lora_rank", "kv_lora_rank"):
            fits = getattr(attention, name) <= model.d_model
            fix = f"a latent wider than model.d_model = {model.d_model} compresses nothing; at most that"
            report.require(fits, at + name, fix)
    else:
        report.require(attention.head_dim >= 2, at + "head_dim", "must be at least 2")
        report.require(attention.head_dim % 2 == 0, at + "head_dim", "RoPE turns pairs, so it must be even")
    if attention.kind == "gqa":
        fits = attention.n_kv_heads >= 1 and attention.n_heads % attention.n_kv_heads == 0
        report.require(fits, at + "n_kv_heads", f"must divide model.attention.n_heads = {attention.n_heads}")
    report.require(model.rope.theta > 1, "model.rope.theta", "must be above 1: later pairs turn slower")
    fast, slow = model.rope.yarn_beta_fast, model.rope.yarn_beta_slow
    fix = f"at least yarn_beta_slow = {slow}, which must be above 0"
    report.require(fast >= slow > 0, "model.rope.yarn_beta_fast", fix)


def _check_moe(report: _Report, model: ModelConfig) -> None:
    moe, at = model.moe, "model.moe."
    sizes = ("n_experts", "top_k", "d_ff_expert", "n_groups", "topk_groups")
    for name in sizes:
        report.require(getattr(moe, name) >= 1, at + name, "must be at least 1")
    if min(getattr(moe, name) for name in sizes) < 1:
        return
    divides = moe.n_experts % moe.n_groups == 0
    report.require(divides, at + "n_groups", f"must divide n_experts = {moe.n_experts}")
    report.require(moe.topk_groups <= moe.n_groups, at + "topk_groups", f"at most n_groups = {moe.n_groups}")
    if not divides or moe.topk_groups > moe.n_groups or moe.n_groups == 1:
        report.require(moe.top_k <= moe.n_experts, at + "top_k", f"at most n_experts = {moe.n_experts}")
        return
    a_group = moe.n_experts // moe.n_groups
    fix = f"at most {moe.topk_groups * a_group}: topk_groups = {moe.topk_groups} groups of {a_group} experts"
    report.require(moe.top_k <= moe.topk_groups * a_group, at + "top_k", fix)
    limited = moe.topk_groups < moe.n_groups and moe.group_score == "top2_sum"
    report.require(
        a_group >= 2 or not limited, at + "group_score", "groups of one expert have no two best; use max"
    )


def _check_training(report: _Report, config: Config) -> None:
    whole = config.fp8.activation_scales == config.fp8.weight_scales == "tensor"
    fix = "tiles are scaled as they are promoted; without it activation_scales and weight_scales are 'tensor'"
    report.require(config.fp8.promotion or whole, "fp8.promotion", fix)
    train, optimizer, model = config.train, config.optimizer, config.model
    longest = model.max_seq_len
    report.require(train.seq_len <= longest, "train.seq_len", f"at most model.max_seq_len = {longest}")
    depth = model.mtp.depth
    report.require(depth < train.seq_len, "model.mtp.depth", f"below train.seq_len = {train.seq_len}")
    chunk = train.loss_chunk
    report.require(
        not chunk or train.seq_len % chunk == 0, "train.loss_chunk", f"must divide seq_len = {train.seq_len}"
    )
    micro = train.micro_batch_size or train.batch_size
    fix = f"must divide train.batch_size = {train.batch_size}"
    report.require(train.batch_size % micro == 0, "train.micro_batch_size", fix)
    start = train.ramp_start_batch
    fix = f"a multiple of the micro-batch {micro}, at most batch_size = {train.batch_size}"
    report.require(start % micro == 0 and start <= train.batch_size, "train.ramp_start_batch", fix)
    report.require(not start or train.ramp_until > 0, "train.ramp_until", "above 0 when a ramp is asked for")

    share = optimizer.host_share
    report.require(0 < share <= 1, "optimizer.host_share", "is a share of the moments, above 0 to 1")
    fix = "all moments are in device memory: leave it 1.0, or set optimizer.memory to 'host'"
    report.require(share == 1 or optimizer.memory == "host", "optimizer.host_share", fix)

    stones = optimizer.milestones
    ordered = list(stones) == sorted(set(stones)) and all(0 < stone <= 1 for stone in stones)
    report.require(ordered, "optimizer.milestones", "fractions of the token budget, rising, above 0 to 1")
    wanted = {"v2": 2, "v3": 3}.get(optimizer.schedule)
    if wanted is not None:
        fix = f"the {optimizer.schedule} schedule has {wanted} milestones, or () for the paper's"
        report.require(len(stones) in (0, wanted), "optimizer.milestones", fix)
    if optimizer.schedule == "multi_step":
        report.require(len(stones) > 0, "optimizer.milestones", "the multi_step schedule needs them")
        fix = "one for each milestone, at least 0"
        good = len(optimizer.multipliers) == len(stones) and all(m >= 0 for m in optimizer.multipliers)
        report.require(good, "optimizer.multipliers", fix)


def check_machine(config: Config, n_devices: int, workdir: str | os.PathLike | None) -> list[Problem]:
    """What does not fit this machine: the mesh, the batch and the experts over it, the work directory."""
    problems = check_mesh(config, n_devices)
    if not problems:  # Only a mesh that fits has ranks for a pipeline.
        problems = [Problem(*problem) for problem in pipeline_problems(config, n_devices)]
    if workdir is not None:
        blocked = _unwritable(Path(workdir))
        if blocked:
            problems.append(Problem("workdir", str(workdir), blocked))
    return problems


def check_mesh(config: Config, n_devices: int) -> list[Problem]:
    """What of the mesh does not fit `n_devices`, the batch or the experts; fixes propose meshes that do."""
    return [Problem(*problem) for problem in mesh_checks.problems(config, n_devices)]


def _unwritable(path: Path) -> str | None:
    """Why a directory cannot be created or written, looking at the nearest part of it that exists."""
    nearest = path.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is not a directory; choose another"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} is not writable; choose another or change its permissions"
    return None

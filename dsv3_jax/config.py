"""The typed configuration: one frozen dataclass a section, each field with its meaning and default.

A run is a Python file in `configs/` whose `get_config()` returns a ConfigDict (`config_dict` below fills
in the defaults, so that every field can be overridden on the command line). `config_checks.typed` turns
it once into `Config` and reports every problem at once; the rest of the code sees only `Config`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict


@dataclass(frozen=True)
class AttentionConfig:
    """Attention (DeepSeek-V2 §2.1; DeepSeek-V3 §2.1.1) and the baselines that it replaces."""

    kind: str = "mla"  # "mla", or a baseline: "mha", "gqa", "mqa".
    n_heads: int = 4
    q_lora_rank: int = 0  # MLA: width of the compressed query; 0 projects queries from the hidden state.
    kv_lora_rank: int = 64  # MLA: width of the cached latent.
    qk_nope_head_dim: int = 32  # MLA: part of a query/key head without position.
    qk_rope_head_dim: int = 16  # MLA: the decoupled, rotated part; one key for all heads.
    v_head_dim: int = 32  # MLA: width of a value head.
    n_kv_heads: int = 1  # GQA only: key/value heads.
    head_dim: int = 64  # Baselines: width of query, key and value heads.
    latent_norm_eps: float = 1e-6  # MLA: of the norms of the latents; `norm_eps` is that of all others.
    implementation: str = "auto"  # Of `pallas_kernels.mla_attention`.


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, and YaRN for long context (arXiv 2309.00071)."""

    theta: float = 10000.0
    interleaved: bool = True  # Pairs (x0,x1),(x2,x3)... as in the released MLA checkpoints; else two halves.
    yarn_factor: float = 1.0  # s: target over original context; 1 turns YaRN off.
    yarn_original_len: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE (arXiv 2401.06066; DeepSeek-V3 §2.1.2) and how its load is balanced."""

    n_dense_layers: int = 1  # Layers before the first MoE layer; `n_layers` of them make a dense model.
    n_experts: int = 8
    n_shared: int = 1  # Shared experts, seen by every token.
    top_k: int = 2
    d_ff_expert: int = 64
    n_groups: int = 1  # Group-limited routing: experts live in groups (nodes) ...
    topk_groups: int = 1  # ... and a token reaches at most so many of them.
    group_score: str = "top2_sum"  # A group's score: "top2_sum" (V3) or "max" (V2).
    gate: str = "sigmoid"  # "sigmoid" (V3) or "softmax" (V2).
    normalize_gates: bool = True  # Divide the selected gates by their sum.
    routed_scale: float = 1.0
    bias_speed: float = 0.001  # Auxiliary-loss-free balancing (arXiv 2408.15664); 0 turns the bias off.
    bias_final_ratio: float = 1.0  # The speed shrinks linearly to this part of itself ...
    bias_until: float = 1.0  # ... at this fraction of the token budget, after which the bias stands still.
    sequence_loss: float = 1e-4  # Weight of V3's sequence-wise balance loss (eq 17).
    batch_loss: float = 0.0  # Weight of the batch-wise balance loss (V3 §4.5.3).
    expert_loss: float = 0.0  # Weights of V2's expert-, device- and communication-level losses (eqs 23-31).
    device_loss: float = 0.0
    communication_loss: float = 0.0
    implementation: str = "auto"  # Of `pallas_kernels.grouped_matmul`.


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3 §2.2) and its baseline of parallel heads (arXiv 2404.19737)."""

    depth: int = 0  # D: extra tokens predicted; 0 turns it off.
    kind: str = "sequential"  # "sequential" (V3's causal chain) or "parallel" (independent blocks).
    loss_weight: float = 0.3  # lambda ...
    final_loss_weight: float = 0.1  # ... and what it becomes ...
    loss_weight_until: float = 10 / 14.8  # ... after this fraction of the token budget.


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model."""

    vocab_size: int = 512
    d_model: int = 128
    n_layers: int = 4
    d_ff: int = 256  # Hidden width of the dense SwiGLU layers.
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.006
    tie_embeddings: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and how documents become sequences."""

    source: str = "python_stdlib"  # Embedded corpus; "tfds:NAME[/CONFIG][:VERSION]"; or "files:GLOB".
    text_field: str = "text"  # Field of a TFDS example, a JSON line or a Parquet row that holds the text.
    data_dir: str = ""  # Where TFDS datasets are; "" is TFDS's default.
    cache_dir: str = ""  # Where tokenised documents are kept; "" is ~/.cache/dsv3_jax.
    tokenizer: str = "byte"  # "byte", or the path of a `tokenizer.json`.
    validation_fraction: float = 0.02  # Of the documents, held out for evaluation.
    mask_documents: bool = False  # Attend and predict within a document only.
    fim_rate: float = 0.0  # Fraction of documents rearranged to prefix-suffix-middle (V3: 0.1).
    read_threads: int = 2


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. Milestones are fractions of the token budget."""

    peak_lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # Never on norms; on embeddings by `decay_embeddings`.
    decay_embeddings: bool = True  # DeepSeek decays them; norms' scales are the only exception.
    clip_norm: float = 1.0  # Global gradient norm; 0 turns clipping off.
    moment_dtype: str = "float32"  # Or "bfloat16" (V3 §3.3.2).
    memory: str = "device"  # Where the moments are kept; or "host".
    host_share: float = 1.0  # With memory "host": at least this share of them is there, largest arrays first.
    schedule: str = "cosine"  # "constant", "cosine", "multi_step", "v2" or "v3".
    warmup_steps: int = 100
    final_ratio: float = 0.1  # "cosine" and "v3": the floor of the cosine over the peak.
    milestones: tuple[float, ...] = ()  # "multi_step": where the rate drops. "v2", "v3": () is the paper's.
    multipliers: tuple[float, ...] = ()  # "multi_step": the rate over the peak after each milestone.


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    # First weights: a Hugging Face folder, one of `dsv3 import` or a work directory; "": random, by `seed`.
    init_from: str = ""
    steps: int = 100
    seq_len: int = 256
    batch_size: int = 8  # Sequences an optimizer step.
    micro_batch_size: int = 0  # Sequences a forward pass; fewer than the batch accumulate. 0: the batch.
    ramp_start_batch: int = 0  # Batch size at the start, growing linearly to `batch_size`; 0: no ramp.
    ramp_until: float = 0.0  # Fraction of the token budget at which the ramp ends.
    token_budget: int = 0  # What schedules measure against; 0: the tokens of `steps` steps.
    seed: int = 0
    precision: str = "bf16"  # Compute in "bf16", "fp32" or "fp8" (section `fp8`); parameters are always fp32.
    remat: str = "none"  # "none", "full", "dots" or "v3": what the backward pass recomputes.
    loss_chunk: int = 0  # Positions whose logits exist at once; 0: all.
    # How micro-batches pass the stages of `mesh.pipe`: "gpipe", "1f1b", "interleaved", "zb1p", "dualpipe" or
    # "dualpipev"; "": one after the other, with no pipeline.
    pipeline: str = ""
    pipeline_chunks: int = 2  # "interleaved": stages on each rank.
    log_every: int = 10
    eval_every: int = 100  # 0: only at the end.
    eval_batches: int = 8
    ema_decay: float = 0.0  # Exponential moving average of the parameters; 0: none.
    ema_memory: str = "device"  # Or "host".
    max_bad_steps: int = 5  # Consecutive non-finite steps that stop the run.
    spike_factor: float = 1.5  # A loss over so many times its running mean is reported.
    sample_prompt: str = "def "
    sample_tokens: int = 200  # 0: no text sample at the end.


@dataclass(frozen=True)
class FP8Config:
    """DeepSeek-V3's FP8 recipe (§3.3), for `train.precision = "fp8"`; the paper's choices by default."""

    activation_scales: str = "tile"  # One for 1x128, 128x1 in weight gradients. "tensor": one; a control.
    weight_scales: str = "block"  # One for 128x128. "tensor": one a matrix; a control.
    promotion: bool = True  # Each 128 products are summed apart. False: a control, of tensor scales.
    gradient_dtype: str = "e4m3"  # Of output gradients; or "e5m2", as per-tensor recipes have it.
    power_of_two: bool = True  # Scales of what goes to experts and of the attention output.
    attention_output: str = "fp8"  # How Wgrad of w_o gets it; or "e5m6", or "bf16" (attention's own copy).
    swiglu_input: str = "fp8"  # How it is kept for the backward pass; or "bf16".
    implementation: str = "auto"  # Of the FP8 products and quantisation in `pallas_kernels`.


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 100  # Steps between checkpoints; one is always written at the end. 0: none at all.
    keep_last: int = 3
    keep_best: int = 1  # By validation loss.


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh; at most one axis may be -1, which means the rest of the devices."""

    pipe: int = 1  # Pipeline stages.
    data: int = -1
    expert: int = 1  # Each holds its part of the experts; the batch is split over data x expert.
    # Over `data`: "replicated", "zero1" (optimizer state split, and experts) or "fsdp" (all parameters too).
    sharding: str = "replicated"
    # How tokens reach experts elsewhere: "dense", "ragged", "remote" or "gather" (`parallel.transport`).
    transport: str = "auto"
    # Ranks of `expert` in a node: a token travels to a node once and is handed on there. 1: straight to each
    # rank; 0: as the devices say.
    expert_node: int = 0
    dispatch_slack: float = 1.25  # Room over a balanced load; what does not fit goes in further rounds.


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def config_dict(**sections: Any) -> ConfigDict:
    """A ConfigDict with every field of `Config`: its default, or the value in `sections`.

    Unknown names are kept, so that validation can report all of them together.
    """
    tree = _merge(dataclasses.asdict(Config()), sections)
    return ConfigDict(tree, type_safe=False, convert_dict=True)


def _merge(base: dict[str, Any], changes: Any) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and hasattr(value, "items") else value
    return merged

"""Parameters that a token touches, FLOPs a token, and the device's peak: what MFU is made of."""

from typing import Any

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.training.state import parameter_count

# Dense bf16 peaks by the vendors' datasheets, FLOP/s a device.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def active_parameters(config: ModelConfig, params: Any) -> int:
    """Parameters that multiply each token: the output head counted, the embedding's look-up not.

    Args:
      config: of the model.
      params: its parameters or their shapes.
    """
    total = parameter_count(params)
    if not config.tie_embeddings:
        total -= params["embedding"].size
    moe = config.moe
    expert = 3 * config.d_model * moe.d_ff_expert
    layers = max(0, config.n_layers - moe.n_dense_layers)
    layers += config.mtp.depth if layers else 0
    # Each prediction depth multiplies by the shared head again.
    heads = config.mtp.depth * config.d_model * config.vocab_size
    return total - layers * (moe.n_experts - moe.top_k) * expert + heads


def flops_per_token(config: Config, params: Any) -> float:
    """FLOPs of training on a token: 6 an active parameter, and causal attention over the sequence.

    Attention costs `S * heads * (d_qk + d_v)` a layer forward, and twice that backward; what is computed
    again for the backward pass does not count.
    """
    model, a = config.model, config.model.attention
    widths = 2 * a.head_dim
    if a.kind == "mla":
        widths = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    layers = model.n_layers + model.mtp.depth
    attention = 3 * config.train.seq_len * a.n_heads * widths * layers
    return 6.0 * active_parameters(model, params) + attention


def peak_flops(devices: list[Any]) -> float | None:
    """The sum of the devices' peaks, None when one of them is not in the table."""
    kinds = sorted(PEAK_FLOPS, key=len, reverse=True)
    found = [next((PEAK_FLOPS[k] for k in kinds if d.device_kind.startswith(k)), None) for d in devices]
    return None if None in found else sum(peak for peak in found if peak)

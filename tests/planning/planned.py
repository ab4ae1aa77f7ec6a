"""A model with every part, small, and its runs."""

import dataclasses

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    TrainConfig,
)

MODEL = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=4,
    d_ff=80,
    max_seq_len=64,
    attention=AttentionConfig(
        n_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        implementation="reference",
    ),
    moe=MoEConfig(n_experts=8, top_k=2, d_ff_expert=20, implementation="reference"),
    mtp=MTPConfig(depth=1),
)
CONFIG = Config(model=MODEL, train=TrainConfig(seq_len=64, batch_size=8, precision="fp32"))


def run(remat="none", *, data=1, expert=1, sharding="replicated", expert_node=0, **train):
    """A run of that model."""
    options = dict(sharding=sharding, transport="dense", expert_node=expert_node)
    mesh = MeshConfig(data=data, expert=expert, **options)
    return dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, remat=remat, **train), mesh=mesh
    )

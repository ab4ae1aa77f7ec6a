"""DeepSeekMoE 16B (arXiv 2401.06066): 16.4B parameters, 2.8B active, with multi-head attention.

    dsv3 inspect --config=configs/moe_16b.py

The training recipe is that of §5.1.2: 2T tokens at 4096, 4608 sequences a batch, an expert-level balance loss
of 0.001. The data are the embedded corpus and bytes: a run of the published size needs its own corpus and the
tokenizer of the release (`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=102400,
            d_model=2048,
            n_layers=28,
            d_ff=10944,
            max_seq_len=4096,
            norm_eps=1e-06,
            init_std=0.006,
            attention=dict(kind="mha", n_heads=16, head_dim=128),
            rope=dict(theta=10000.0, interleaved=False),
            moe=dict(
                n_dense_layers=1,
                n_experts=64,
                n_shared=2,
                top_k=6,
                d_ff_expert=1408,
                n_groups=1,
                topk_groups=1,
                group_score="max",
                gate="softmax",
                normalize_gates=False,
                routed_scale=1.0,
                bias_speed=0.0,
                sequence_loss=0.0,
                expert_loss=0.001,
            ),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(
            peak_lr=4.2e-4,
            schedule="multi_step",
            milestones=(0.8, 0.9),
            multipliers=(0.316, 0.1),
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=dict(
            steps=106000,
            seq_len=4096,
            batch_size=4608,
            micro_batch_size=512,
            token_budget=2_000_000_000_000,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=dict(every=1000),
        mesh=dict(data=-1, expert=8, sharding="fsdp"),
    )

"""Moonlight-16B-A3B (arXiv 2502.16982): 16B parameters, the shape of V2-Lite with the router of V3.

    dsv3 inspect --config=configs/moonlight_16b.py

The release was trained on 5.7T tokens with Muon; here the optimizer is AdamW. The data are the embedded
corpus and bytes: a run of the published size needs its own corpus and the tokenizer of the release
(`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=163840,
            d_model=2048,
            n_layers=27,
            d_ff=11264,
            max_seq_len=8192,
            norm_eps=1e-05,
            init_std=0.02,
            attention=dict(
                kind="mla",
                n_heads=16,
                q_lora_rank=0,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            rope=dict(theta=50000.0),
            moe=dict(
                n_dense_layers=1,
                n_experts=64,
                n_shared=2,
                top_k=6,
                d_ff_expert=1408,
                n_groups=1,
                topk_groups=1,
                group_score="top2_sum",
                gate="sigmoid",
                normalize_gates=True,
                routed_scale=2.446,
                bias_speed=0.001,
                sequence_loss=1e-3,
            ),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(
            peak_lr=4.2e-4,
            schedule="cosine",
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=dict(
            steps=679500,
            seq_len=8192,
            batch_size=1024,
            micro_batch_size=256,
            token_budget=5_700_000_000_000,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=dict(every=1000),
        mesh=dict(data=-1, expert=8, sharding="fsdp"),
    )

"""Kimi-K2 (arXiv 2507.20534): 1.03T parameters, 32B active.

    dsv3 inspect --config=configs/kimi_k2.py

The release was trained on 15.5T tokens at 4096, 67M tokens a batch, with MuonClip; here the optimizer is
AdamW. YaRN carries the released weights from 4k to 128k. The data are the embedded corpus and bytes: a run of
the published size needs its own corpus and the tokenizer of the release (`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=163840,
            d_model=7168,
            n_layers=61,
            d_ff=18432,
            max_seq_len=131072,
            norm_eps=1e-06,
            init_std=0.006,
            attention=dict(
                kind="mla",
                n_heads=64,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            rope=dict(
                theta=50000.0,
                yarn_factor=32.0,
                yarn_original_len=4096,
                yarn_beta_fast=1.0,
                yarn_beta_slow=1.0,
                yarn_mscale=1.0,
                yarn_mscale_all_dim=1.0,
            ),
            moe=dict(
                n_dense_layers=1,
                n_experts=384,
                n_shared=1,
                top_k=8,
                d_ff_expert=2048,
                n_groups=1,
                topk_groups=1,
                group_score="top2_sum",
                gate="sigmoid",
                normalize_gates=True,
                routed_scale=2.827,
                bias_speed=0.001,
                sequence_loss=1e-3,
            ),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(
            peak_lr=2e-4,
            schedule="cosine",
            warmup_steps=500,
            weight_decay=0.1,
            clip_norm=1.0,
            moment_dtype="bfloat16",
        ),
        train=dict(
            steps=231000,
            seq_len=4096,
            batch_size=16384,
            micro_batch_size=1024,
            token_budget=15_500_000_000_000,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=dict(every=1000),
        mesh=dict(data=-1, expert=64, sharding="fsdp"),
    )

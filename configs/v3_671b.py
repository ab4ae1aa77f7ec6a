"""DeepSeek-V3 and R1 (arXiv 2412.19437, 2501.12948): 671B parameters, 37B active, one prediction depth.

    dsv3 inspect --config=configs/v3_671b.py

The training recipe is that of §4.2: 14.8T tokens at 4096, the batch growing from 3072 to 15360 sequences over
the first 469B. YaRN carries the released weights from 4k to 160k; pre-training itself ran without it
(`--config.model.rope.yarn_factor=1`). The data are the embedded corpus and bytes: a run of the published size
needs its own corpus and the tokenizer of the release (`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=129280,
            d_model=7168,
            n_layers=61,
            d_ff=18432,
            max_seq_len=163840,
            norm_eps=1e-06,
            init_std=0.006,
            attention=dict(
                kind="mla",
                n_heads=128,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            rope=dict(
                theta=10000.0,
                yarn_factor=40.0,
                yarn_original_len=4096,
                yarn_beta_fast=32.0,
                yarn_beta_slow=1.0,
                yarn_mscale=1.0,
                yarn_mscale_all_dim=1.0,
            ),
            moe=dict(
                n_dense_layers=3,
                n_experts=256,
                n_shared=1,
                top_k=8,
                d_ff_expert=2048,
                n_groups=8,
                topk_groups=4,
                group_score="top2_sum",
                gate="sigmoid",
                normalize_gates=True,
                routed_scale=2.5,
                bias_speed=0.001,
                bias_until=14.3 / 14.8,
                sequence_loss=1e-4,
            ),
            mtp=dict(depth=1),
        ),
        data=dict(source="python_stdlib", tokenizer="byte", fim_rate=0.1),
        optimizer=dict(
            peak_lr=2.2e-4,
            schedule="v3",
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
            moment_dtype="bfloat16",
        ),
        train=dict(
            steps=244109,
            seq_len=4096,
            batch_size=15360,
            micro_batch_size=1024,
            ramp_start_batch=3072,
            ramp_until=0.469 / 14.8,
            token_budget=14_800_000_000_000,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=dict(every=1000),
        mesh=dict(data=-1, expert=64, sharding="fsdp"),
    )

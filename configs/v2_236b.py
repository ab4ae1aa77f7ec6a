"""DeepSeek-V2 (arXiv 2405.04434): 236B parameters, 21B active.

    dsv3 inspect --config=configs/v2_236b.py

The training recipe is that of §3.1.2: 8.1T tokens at 4096, the batch growing from 2304 to 9216 sequences over
the first 225B, with the three balance losses of §2.2.3. YaRN carries the released weights from 4k to 160k.
The data are the embedded corpus and bytes: a run of the published size needs its own corpus and the tokenizer
of the release (`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=102400,
            d_model=5120,
            n_layers=60,
            d_ff=12288,
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
                yarn_mscale=0.707,
                yarn_mscale_all_dim=0.707,
            ),
            moe=dict(
                n_dense_layers=1,
                n_experts=160,
                n_shared=2,
                top_k=6,
                d_ff_expert=1536,
                n_groups=8,
                topk_groups=3,
                group_score="max",
                gate="softmax",
                normalize_gates=False,
                routed_scale=16.0,
                bias_speed=0.0,
                sequence_loss=0.0,
                expert_loss=0.003,
                device_loss=0.05,
                communication_loss=0.02,
            ),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(
            peak_lr=2.4e-4,
            schedule="v2",
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=dict(
            steps=220698,
            seq_len=4096,
            batch_size=9216,
            micro_batch_size=768,
            ramp_start_batch=2304,
            ramp_until=0.225 / 8.1,
            token_budget=8_100_000_000_000,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=1000,
        ),
        checkpoint=dict(every=1000),
        mesh=dict(data=-1, expert=8, sharding="fsdp"),
    )

"""A 300M-parameter DeepSeek-V3 in miniature, for comparisons on one GPU in minutes.

    python train.py --config=configs/proxy_300m.py --workdir=runs/proxy_300m

Every part of DeepSeek-V3: query compression, group-limited routing, a shared expert, the balance loss and
one prediction depth.
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=512,
            d_model=768,
            n_layers=12,
            d_ff=2048,
            max_seq_len=4096,
            init_std=0.02,
            attention=dict(
                kind="mla",
                n_heads=6,
                q_lora_rank=384,
                kv_lora_rank=256,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            moe=dict(
                n_dense_layers=1,
                n_experts=32,
                n_shared=1,
                top_k=4,
                d_ff_expert=320,
                n_groups=4,
                topk_groups=2,
                routed_scale=2.5,
            ),
            mtp=dict(depth=1),
        ),
        data=dict(source="python_stdlib", tokenizer="byte", fim_rate=0.1),
        optimizer=dict(peak_lr=6e-4, schedule="cosine", warmup_steps=200, moment_dtype="bfloat16"),
        train=dict(
            steps=2000,
            seq_len=1024,
            batch_size=32,
            precision="bf16",
            log_every=20,
            eval_every=500,
            eval_batches=4,
        ),
        checkpoint=dict(every=1000, keep_last=1),
        mesh=dict(data=1, expert=1),
    )

"""Every idea of DeepSeek-V3 in a model that two CPU cores train in minutes, on Python's own source code.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

2.3M parameters, about two and a half minutes. The validation loss ends near 2.0 nats a byte, that of a bigram
model of the same text, which the run prints beside it, is 2.5.
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=264,  # 256 bytes and 5 special tokens, rounded up to a multiple of 8.
            d_model=128,
            n_layers=3,
            d_ff=256,
            max_seq_len=1024,
            init_std=0.05,
            attention=dict(
                kind="mla",
                n_heads=4,
                q_lora_rank=64,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
            ),
            # YaRN is ready: `--config.model.rope.yarn_factor=4` extends the context to four times this.
            rope=dict(yarn_original_len=256),
            moe=dict(
                n_dense_layers=1,
                n_experts=16,
                n_shared=1,
                top_k=2,
                d_ff_expert=96,
                n_groups=4,
                topk_groups=2,
                routed_scale=2.0,
                # A short run at a high learning rate: a fast bias at first, a fine one at the end.
                bias_speed=0.02,
                bias_final_ratio=0.02,
                sequence_loss=1e-4,
            ),
            mtp=dict(depth=1),
        ),
        data=dict(source="python_stdlib", tokenizer="byte", fim_rate=0.0),
        optimizer=dict(peak_lr=3e-3, schedule="cosine", warmup_steps=50),
        train=dict(
            steps=300,
            seq_len=256,
            batch_size=8,
            precision="fp32",
            log_every=20,
            eval_every=100,
            eval_batches=16,
            sample_prompt="import os\n\n\ndef main(args):\n    if args",
        ),
        checkpoint=dict(every=100),
        mesh=dict(data=1, expert=1),
    )

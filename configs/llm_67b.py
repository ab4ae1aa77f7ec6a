"""DeepSeek LLM 67B (arXiv 2401.02954): 67.4B parameters, dense, grouped-query attention.

    dsv3 inspect --config=configs/llm_67b.py

The training recipe is that of §2.3: 2T tokens at 4096, 4608 sequences a batch. The data are the embedded
corpus and bytes: a run of the published size needs its own corpus and the tokenizer of the release
(`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=102400,
            d_model=8192,
            n_layers=95,
            d_ff=22016,
            max_seq_len=4096,
            norm_eps=1e-06,
            init_std=0.006,
            attention=dict(kind="gqa", n_heads=64, n_kv_heads=8, head_dim=128),
            rope=dict(theta=10000.0, interleaved=False),
            moe=dict(n_dense_layers=95),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(
            peak_lr=3.2e-4,
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
        mesh=dict(data=-1, expert=1, sharding="fsdp"),
    )

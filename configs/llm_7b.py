"""DeepSeek LLM 7B (arXiv 2401.02954): 6.9B parameters, dense, multi-head attention.

    dsv3 inspect --config=configs/llm_7b.py

The training recipe is that of §2.3: 2T tokens at 4096, 2304 sequences a batch. The data are the embedded
corpus and bytes: a run of the published size needs its own corpus and the tokenizer of the release
(`data.source`, `data.tokenizer`).
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=102400,
            d_model=4096,
            n_layers=30,
            d_ff=11008,
            max_seq_len=4096,
            norm_eps=1e-06,
            init_std=0.006,
            attention=dict(kind="mha", n_heads=32, head_dim=128),
            rope=dict(theta=10000.0, interleaved=False),
            moe=dict(n_dense_layers=30),
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
            steps=212000,
            seq_len=4096,
            batch_size=2304,
            micro_batch_size=256,
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

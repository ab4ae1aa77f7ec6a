"""6.6B parameters, 1.05B of them active, on one 141 GB GPU with fp32 master weights.

    python train.py --config=configs/small_gpu.py --workdir=runs/small_gpu

The shape in which implementations are compared: Moonlight's layers, 12 of them. FLOPs a token are
6 * active + 3 * seq * heads * (192 + 128) * layers = 7.027 GFLOP; the progress line gives the MFU.
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=32768,
            d_model=2048,
            n_layers=12,
            d_ff=8192,
            max_seq_len=4096,
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
                routed_scale=2.446,
                sequence_loss=1e-4,
            ),
            mtp=dict(depth=0),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(peak_lr=3e-4, schedule="cosine", warmup_steps=100, moment_dtype="bfloat16"),
        train=dict(
            steps=1000,
            seq_len=4096,
            batch_size=8,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=500,
            eval_batches=4,
        ),
        checkpoint=dict(every=500, keep_last=1, keep_best=0),
        mesh=dict(data=1, expert=1),
    )

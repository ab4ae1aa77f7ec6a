"""DeepSeek-V2-Lite's shape, 15.7B parameters, trained on two 141 GB GPUs with fp32 master weights.

    python train.py --config=configs/v2_lite_2gpu.py --workdir=runs/v2_lite

Half of the experts on each GPU (`mesh.expert=2`), all else split over both (`fsdp`). A GPU holds 7.85B
parameters: 88 GiB of fp32 weights, fp32 gradients and two bf16 moments, and with `remat="v3"` the
activations of 3 sequences. On two H200s it took 115 GiB of the 132 that JAX takes, and ran at 16,365 tokens/s
a GPU (17,539 and 107 GiB with `train.precision=fp8`). The published recipe and what differs from it are in
`v2_lite.py`.
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
        model=dict(
            vocab_size=102400,
            d_model=2048,
            n_layers=27,
            d_ff=10944,
            max_seq_len=4096,
            init_std=0.006,
            attention=dict(
                kind="mla",
                n_heads=16,
                q_lora_rank=0,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            moe=dict(
                n_dense_layers=1,
                n_experts=64,
                n_shared=2,
                top_k=6,
                d_ff_expert=1408,
                group_score="max",
                gate="softmax",
                normalize_gates=False,
                bias_speed=0.001,
                sequence_loss=0.0,
                expert_loss=0.003,
            ),
        ),
        data=dict(source="python_stdlib", tokenizer="byte"),
        optimizer=dict(peak_lr=4.2e-4, schedule="cosine", warmup_steps=100, moment_dtype="bfloat16"),
        train=dict(
            steps=1000,
            seq_len=4096,
            batch_size=6,
            precision="bf16",
            remat="v3",
            loss_chunk=512,
            log_every=10,
            eval_every=500,
            eval_batches=4,
        ),
        checkpoint=dict(every=0),
        mesh=dict(data=1, expert=2, sharding="fsdp"),
    )

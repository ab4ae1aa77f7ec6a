"""Configurations that together take every value that parity is claimed for, and models of them.

Widths are the same in all of them, so that JAX compiles an operation once for the lot.
"""

import dataclasses

import numpy as np

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig

MLA = AttentionConfig(
    n_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6
)
YARN = {"yarn_factor": 4.0, "yarn_original_len": 8, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.25}
# (mscale, mscale_all_dim); None: no YaRN.
MSCALES = (None, (1.0, 1.0), (0.707, 0.707), (1.2, 0.8))


def rope(mscales, interleaved):
    values = (
        {}
        if mscales is None
        else YARN | dict(zip(("yarn_mscale", "yarn_mscale_all_dim"), mscales, strict=True))
    )
    return RopeConfig(theta=100.0, interleaved=interleaved, **values)


def latent(gate, q_rank, groups, normalise, scale, shared, layers, mscales, interleaved, tied):
    dense, sparse = layers
    moe = MoEConfig(
        n_dense_layers=dense,
        n_experts=16,
        n_shared=shared,
        top_k=3,
        d_ff_expert=8,
        n_groups=groups,
        topk_groups=max(1, groups // 2),
        group_score="top2_sum" if gate == "sigmoid" else "max",
        gate=gate,
        normalize_gates=normalise,
        routed_scale=scale,
    )
    return ModelConfig(
        vocab_size=31,
        d_model=16,
        n_layers=dense + sparse,
        d_ff=24,
        attention=dataclasses.replace(MLA, q_lora_rank=q_rank),
        rope=rope(mscales, interleaved),
        moe=moe,
        tie_embeddings=tied,
    )


def dense(kind, kv_heads, mscales, layers, tied):
    return ModelConfig(
        vocab_size=31,
        d_model=16,
        n_layers=layers,
        d_ff=24,
        attention=AttentionConfig(kind=kind, n_heads=4, n_kv_heads=kv_heads, head_dim=8),
        rope=rope(mscales, False),
        moe=MoEConfig(n_dense_layers=layers),
        tie_embeddings=tied,
    )


def generate():
    """{name: configuration}, the same every time."""
    rng = np.random.default_rng(0)

    def pick(*values):
        return values[rng.integers(len(values))]

    found = {}
    for i in range(
        36
    ):  # DeepSeek-V3: group counts, dense layers and shared experts in turn, the rest at random.
        found[f"v3_{i}"] = latent(
            "sigmoid",
            pick(0, 12),
            (1, 2, 4, 8)[i % 4],
            pick(True, False),
            pick(1.0, 2.5, 16.0),
            i % 3,
            ((1, 1), (0, 1), (0, 2), (2, 1), (0, 1), (1, 1), (3, i % 2), (0, 1), (0, 1))[i % 9],
            MSCALES[rng.integers(4)],
            pick(True, False),
            pick(True, False, False),
        )
    for i in range(16):  # DeepSeek-V2: raw gates, interleaved pairs.
        found[f"v2_{i}"] = latent(
            "softmax",
            pick(0, 12),
            (1, 2, 4, 8)[i % 4],
            False,
            pick(1.0, 16.0),
            1 + i % 2,
            ((1, 1), (0, 1), (0, 2))[i % 3],
            MSCALES[rng.integers(4)],
            True,
            pick(True, False, False),
        )
    for i in range(14):
        kind, kv_heads = (("mha", 4), ("gqa", 2), ("mqa", 1))[i % 3]
        found[f"llama_{i}"] = dense(kind, kv_heads, pick(None, (1.0, 1.0)), 1 + i % 2, pick(True, False))
    return found


CONFIGS = generate()


def plain(config):
    """The configuration with the reference implementations, which are the fewest operations."""
    return dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, implementation="reference"),
        moe=dataclasses.replace(config.moe, implementation="reference"),
    )


def random_variables(config, seed=0, dtype=np.float32):
    """Weights of variance 1 / inputs, norms and router biases away from 1 and 0, as numpy arrays."""
    from dsv3_jax.convert import mapping

    rng, found = np.random.default_rng(seed), []
    for path, leaf in mapping.leaves(config).items():
        if path[0] == "router":
            steers = mapping.has_bias(config)
            values = rng.uniform(-0.3, 0.3, leaf.shape) if steers else np.zeros(leaf.shape)
        elif path[-1] == "scale":
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(size=leaf.shape) * leaf.matrix[1] ** -0.5
        found.append((path, values.astype(np.float32 if path[0] == "router" else dtype)))
    return {"params": {}, "router": {}} | mapping.nested(found)

"""Parameters and FLOPs against the published figures and against hand counts."""

import types

import jax
import pytest
from flax.core import meta

from dsv3_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig, MTPConfig, TrainConfig
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.training.state import parameter_count
from dsv3_jax.training.throughput import PEAK_FLOPS, active_parameters, flops_per_token, peak_flops

V3 = ModelConfig(
    vocab_size=129280,
    d_model=7168,
    n_layers=61,
    d_ff=18432,
    attention=AttentionConfig(
        n_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        n_dense_layers=3, n_experts=256, n_shared=1, top_k=8, d_ff_expert=2048, n_groups=8, topk_groups=4
    ),
)


def shapes_of(model):
    return meta.unbox(jax.eval_shape(lambda key: init_variables(Transformer(model), key), jax.random.key(0)))[
        "params"
    ]


def test_deepseek_v3_has_its_published_size():
    params = shapes_of(V3)
    # DeepSeek-V3 §4.2: 671B parameters, 37B active (36.7B with the embedding, which ours leaves out).
    assert parameter_count(params) / 1e9 == pytest.approx(671.0, abs=0.1)
    embedding = V3.vocab_size * V3.d_model
    assert (active_parameters(V3, params) + embedding) / 1e9 == pytest.approx(37.0, rel=0.02)


def hand_counted():
    """A model small enough to count on paper."""
    attention = AttentionConfig(kind="mha", n_heads=2, head_dim=6)
    moe = MoEConfig(n_dense_layers=1, n_experts=4, n_shared=2, top_k=2, d_ff_expert=3)
    return ModelConfig(vocab_size=11, d_model=10, n_layers=3, d_ff=7, attention=attention, moe=moe)


def test_hand_counts():
    model = hand_counted()
    attention, norms, expert = 4 * 10 * 12, 2 * 10, 3 * 10 * 3
    shared_and_router = 2 * expert + 10 * 4
    dense, moe = attention + norms + 3 * 10 * 7, attention + norms + shared_and_router
    total = 11 * 10 + 10 * 11 + 10 + dense + 2 * (moe + 4 * expert)
    active = 10 * 11 + 10 + dense + 2 * (moe + 2 * expert)
    params = shapes_of(model)
    assert parameter_count(params) == total
    assert active_parameters(model, params) == active
    config = Config(model=model, train=TrainConfig(seq_len=16))
    # A token sees 8 others on average: 2 FLOPs a product, for q k^T and for the sum over v.
    forward = 3 * 2 * 8 * 2 * (6 + 6)
    assert flops_per_token(config, params) == 6 * active + 3 * forward


@pytest.mark.parametrize("tied", [False, True])
def test_a_prediction_depth_counts_its_block_and_the_head_again(tied):
    from dataclasses import replace

    one = replace(hand_counted(), mtp=MTPConfig(depth=1), tie_embeddings=tied)
    two = replace(one, mtp=MTPConfig(depth=2))
    expert = 3 * 10 * 3
    block = 4 * 10 * 12 + 2 * 10 + (2 + 2) * expert + 10 * 4
    merge_and_norms = 2 * 10 * 10 + 3 * 10
    difference = active_parameters(two, shapes_of(two)) - active_parameters(one, shapes_of(one))
    assert difference == block + merge_and_norms + 10 * 11


def test_peaks():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    assert peak_flops([device("NVIDIA H200")] * 2) == 2 * PEAK_FLOPS["NVIDIA H200"]
    assert peak_flops([device("TPU v5 lite")]) == PEAK_FLOPS["TPU v5 lite"]  # Not that of "TPU v5".
    assert peak_flops([device("TPU v5p")]) == PEAK_FLOPS["TPU v5"]
    assert peak_flops([device("NVIDIA H200"), device("cpu")]) is None

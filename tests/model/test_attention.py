"""MLA, MHA, GQA and MQA, values and gradients, against float64 numpy written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import AttentionConfig, ModelConfig, RopeConfig
from dsv3_jax.model.attention import attention_module, rope_dim
from dsv3_jax.model.rope import rotation
from tests.model.translate import attention_to_oracle
from tests.oracles.gradient import directional_derivative
from tests.oracles.transformer import attention
from tests.oracles.tree import tree_map

SEQ = 6
YARN = RopeConfig(
    yarn_factor=4.0, yarn_original_len=8, yarn_beta_fast=2.0, yarn_beta_slow=0.25, yarn_mscale=0.7
)
MLA = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
KINDS = {
    "mla": (dict(kind="mla", n_heads=3, **MLA), YARN),
    "mla with compressed queries": (dict(kind="mla", n_heads=2, q_lora_rank=10, **MLA), RopeConfig()),
    "mha": (dict(kind="mha", n_heads=3, head_dim=8), YARN),
    "gqa": (dict(kind="gqa", n_heads=6, n_kv_heads=2, head_dim=4), RopeConfig(interleaved=False)),
    "mqa": (dict(kind="mqa", n_heads=4, head_dim=6), RopeConfig()),
}


def leaves(tree):
    return [np.asarray(tree[name], np.float64) for name in sorted(tree)]


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients(name):
    fields, rope = KINDS[name]
    config = ModelConfig(d_model=16, init_std=0.3, attention=AttentionConfig(**fields), rope=rope)
    module = attention_module(config, "attention")
    rng = np.random.default_rng(2)
    h = jnp.asarray(rng.normal(size=(2, SEQ, 16)), jnp.float32)
    # One row is a single document; the other packs two, each with its own positions.
    positions = np.array([range(SEQ), [0, 1, 2, 3, 0, 1]], np.int32)
    segments = np.array([[1] * SEQ, [1, 1, 1, 1, 2, 2]], np.int32)
    cotangent = rng.normal(size=h.shape)

    @jax.jit
    def ours(params, h):
        def value(params, h):
            turn = rotation(config.rope, rope_dim(config.attention), jnp.asarray(positions))
            out = module.apply({"params": params}, h, turn, jnp.asarray(segments))
            return jnp.vdot(out, cotangent.astype(np.float32)), out

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, h)

    turn = rotation(config.rope, rope_dim(config.attention), jnp.asarray(positions))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), h, turn, None))["params"]
    unboxed = {k: v["scale"].value if isinstance(v, dict) else v.value for k, v in shapes.items()}
    params = {k: jnp.asarray(0.3 * rng.standard_normal(v.shape), jnp.float32) for k, v in unboxed.items()}
    params = {k: {"scale": 1 + v} if k.endswith("norm") else v for k, v in params.items()}
    (_, out), (dparams, dh) = ours(params, h)

    def oracle(p):
        rows = [attention(p["h"][b], p["w"], config, positions[b], segments[b]) for b in range(2)]
        return np.stack(rows)

    at = {"h": np.asarray(h), "w": attention_to_oracle(params, config)}
    # float32 sums of at most 16 products near 1.
    np.testing.assert_allclose(out, oracle(at), rtol=2e-5, atol=2e-5)
    gradient = {"h": np.asarray(dh), "w": attention_to_oracle(dparams, config)}
    for part in ("h", "w"):
        along = tree_map(lambda x: rng.standard_normal(x.shape), at)
        along = {k: v if k == part else tree_map(np.zeros_like, v) for k, v in along.items()}
        slope = directional_derivative(lambda t: float(np.vdot(oracle(t), cotangent)), at, along)
        pairs = [(gradient["h"], along["h"])] if part == "h" else []
        if part == "w":
            pairs = list(zip(leaves(gradient["w"]), leaves(along["w"]), strict=True))
        size = sum(np.abs(g * a).sum() for g, a in pairs)
        # Relative to the sum of magnitudes, since the terms cancel: float32 rounding of each term.
        assert abs(slope - sum(np.vdot(g, a) for g, a in pairs)) < 1e-5 * size

"""The oracles against Hugging Face transformers, computed in float64.

Transformers casts norms, softmax, router and rotary angles to float32 by name. The `double` fixture makes
those names mean float64, so the two sides differ by rounding alone: 1e-16 for each operation, a few hundred
of them in a row, values near 1. TOLERANCE leaves a factor of 100, and float32 anywhere would break it.
"""

from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from tests.oracles import mtp, optimizer, rope, transformer
from tests.oracles.from_transformers import layer_params, model_like, model_params, rope_parameters, state_of
from tests.oracles.gradient import directional_derivative
from tests.oracles.tree import Tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling_deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
modeling_layers = pytest.importorskip("transformers.modeling_layers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

TOLERANCE = 1e-11
MLA = AttentionConfig(
    n_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5
)
YARN = RopeConfig(
    theta=50.0, yarn_factor=4.0, yarn_original_len=128, yarn_mscale=0.9, yarn_mscale_all_dim=0.7
)
V3_MOE = MoEConfig(
    n_dense_layers=1,
    n_experts=8,
    n_shared=1,
    top_k=3,
    d_ff_expert=10,
    n_groups=4,
    topk_groups=2,
    routed_scale=2.5,
)
V2_MOE = replace(
    V3_MOE, n_shared=2, group_score="max", gate="softmax", normalize_gates=False, routed_scale=16.0
)
V3 = ModelConfig(vocab_size=31, d_model=16, n_layers=3, d_ff=24, attention=MLA, rope=YARN, moe=V3_MOE)
V2 = replace(V3, moe=V2_MOE, rope=replace(YARN, yarn_mscale=0.707, yarn_mscale_all_dim=0.707))
DENSE = replace(V3, moe=MoEConfig(n_dense_layers=3), rope=RopeConfig(interleaved=False))
GQA = replace(DENSE, attention=AttentionConfig(kind="gqa", n_heads=4, n_kv_heads=2, head_dim=8))
CASES = {
    "v3": V3,
    "v3, no query compression, halves, no YaRN": replace(
        V3, attention=replace(MLA, q_lora_rank=0), rope=RopeConfig(interleaved=False)
    ),
    "v3, raw gates, one group, tied": replace(
        V3, moe=replace(V3_MOE, n_groups=1, topk_groups=1, normalize_gates=False), tie_embeddings=True
    ),
    "v2": V2,
    "v2-lite": replace(
        V2, attention=replace(MLA, q_lora_rank=0), moe=replace(V2_MOE, n_groups=1, topk_groups=1)
    ),
    "gqa": GQA,
    "gqa, yarn": replace(GQA, rope=replace(YARN, interleaved=False, yarn_mscale=1.0)),
    "mha": replace(GQA, attention=AttentionConfig(kind="mha", n_heads=4, head_dim=4)),
    "mqa": replace(GQA, attention=AttentionConfig(kind="mqa", n_heads=4, head_dim=8)),
}


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def randomise(module, seed: int = 0) -> None:
    """Weights of variance 1 / inputs, norms' gains and router biases of every sign and size."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if p.ndim > 1:
                p.copy_(torch.from_numpy(rng.normal(size=p.shape) * p.shape[-1] ** -0.5))
            elif "norm" in name:
                p.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, p.shape)))
            elif "correction_bias" in name:
                p.copy_(torch.from_numpy(rng.uniform(-0.3, 0.3, p.shape)))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss(double, case):
    c = CASES[case]
    reference = model_like(c)
    randomise(reference)
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, 12)
    targets = np.append(tokens[1:], 3)
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        # transformers shifts the labels itself, and ignores -100.
        expected = reference(ids, labels=torch.where(torch.arange(12)[None] == 5, -100, ids))
    out = transformer.forward(model_params(state_of(reference), c), tokens, c)
    np.testing.assert_allclose(out.logits, expected.logits[0].numpy(), rtol=0, atol=TOLERANCE)
    valid = ~np.isin(np.arange(12), [4, 11])
    loss = transformer.cross_entropy(out.logits, targets, valid)
    np.testing.assert_allclose(loss, expected.loss.item(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["v3", "gqa"])
def test_packed_documents(double, case):
    """Segments equal transformers' packing, which it reads off positions that start again at 0."""
    c = CASES[case]
    reference = model_like(c)
    randomise(reference)
    tokens = np.random.default_rng(2).integers(0, c.vocab_size, 11)
    segment_ids = np.array([0] * 4 + [1] * 5 + [2] * 2)
    positions = np.concatenate([np.arange(4), np.arange(5), np.arange(2)])
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(tokens)[None], position_ids=torch.from_numpy(positions)[None], use_cache=False
        )
    params = model_params(state_of(reference), c)
    out = transformer.forward(params, tokens, c, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(out.logits, expected.logits[0].numpy(), rtol=0, atol=TOLERANCE)
    # RoPE is relative: positions that run on across documents give the same.
    out = transformer.forward(params, tokens, c, segment_ids=segment_ids)
    np.testing.assert_allclose(out.logits, expected.logits[0].numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["v3", "v2"])
def test_directional_derivative(double, case):
    """The loss's derivative along a random direction in all parameters equals autograd's."""
    c = CASES[case]
    reference = model_like(c)
    randomise(reference)
    tokens = np.random.default_rng(3).integers(0, c.vocab_size, 6)
    ids = torch.from_numpy(tokens)[None]
    reference(ids, labels=ids).loss.backward()
    rng, along, expected = np.random.default_rng(4), {}, 0.0
    gradients = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    for name, value in state_of(reference).items():
        along[name] = rng.normal(size=value.shape) * 0.1 if name in gradients else np.zeros(value.shape)
        expected += np.sum(gradients.get(name, 0.0) * along[name])

    def loss(params: Tree) -> float:
        logits = transformer.forward(params, tokens, c).logits
        return transformer.cross_entropy(logits[:-1], tokens[1:])

    found = directional_derivative(loss, model_params(state_of(reference), c), model_params(along, c))
    # Central differences with a step of 1e-5: truncation 1e-10 times the third derivative, here up to 100.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "original_len", "fast", "slow", "mscale", "mscale_all_dim"),
    [
        (64, 10000.0, 40.0, 4096, 32, 1, 1.0, 1.0),  # V3
        (64, 10000.0, 40.0, 4096, 32, 1, 0.707, 0.707),  # V2
        (64, 50000.0, 32.0, 4096, 1, 1, 1.0, 1.0),  # Kimi K2: both bounds in one pair.
        (16, 10000.0, 4.0, 128, 32, 1, 1.2, 0.8),
        (8, 10.0, 8.0, 4096, 512, 2, 0.5, 1.0),  # The upper bound beyond the last pair.
        (8, 10.0, 2.0, 6, 32, 1, 1.0, 1.0),  # Both bounds clamped to 0: a step.
    ],
)
def test_yarn(double, dim, theta, factor, original_len, fast, slow, mscale, mscale_all_dim):
    parameters = RopeConfig(theta, True, factor, original_len, fast, slow, mscale, mscale_all_dim)
    config = transformers.LlamaConfig(
        head_dim=dim, rope_parameters=rope_parameters(parameters), max_position_embeddings=64
    )
    frequencies, attention_factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    found = transformer.rope_of(parameters, dim)
    np.testing.assert_allclose(found.inv_freq, frequencies.numpy(), rtol=1e-14)  # A few roundings.
    np.testing.assert_allclose(found.cos_sin_factor, attention_factor, rtol=1e-15)
    scale = modeling_deepseek_v3.yarn_apply_mscale(rope_parameters(parameters), 1.0)
    np.testing.assert_allclose(found.softmax_factor, scale, rtol=1e-15)
    plain = modeling_deepseek_v3.DeepseekV3RotaryEmbedding.compute_default_rope_parameters(config)[0]
    np.testing.assert_allclose(
        rope.inverse_frequencies(dim, config.rope_parameters["rope_theta"]), plain, rtol=1e-14
    )


@pytest.mark.skipif(not hasattr(modeling_layers, "MtpLayer"), reason="this transformers has no MtpLayer")
def test_mtp_chain(double):
    """Three depths against transformers' drafting layer, fed the true tokens."""
    c = V3
    reference = model_like(c)
    randomise(reference)
    params, seq = model_params(state_of(reference), c), 9
    text = np.random.default_rng(5).integers(0, c.vocab_size, seq + 1)
    tokens, targets = text[:-1], text[1:]
    with torch.no_grad():
        h = reference.model(torch.from_numpy(tokens)[None]).last_hidden_state
    layer_class, norm_class = (
        modeling_deepseek_v3.DeepseekV3DecoderLayer,
        modeling_deepseek_v3.DeepseekV3RMSNorm,
    )
    config, expected, params["mtp"] = reference.config, [], []
    for k in (1, 2, 3):
        block = modeling_layers.MtpLayer(config, layer_class, norm_class, c.n_layers - 1).eval()
        randomise(block, seed=k)
        s = state_of(block)
        depth = {name: s[f"{name}.weight"] for name in ("enorm", "hnorm")} | {"norm": s["post_norm.weight"]}
        params["mtp"].append(
            depth | {"eh_proj": s["eh_proj.weight"].T, "block": layer_params(s, "mtp_block", c)}
        )
        rows = seq - k
        ids = torch.arange(rows)[None]
        mask = torch.full((rows, rows), -torch.inf).triu(1)[None, None]
        with torch.no_grad():
            embedded = reference.model.embed_tokens(torch.from_numpy(text[k : k + rows])[None])
            angles = reference.model.rotary_emb(embedded, ids)
            h = block(embedded, h[:, :rows], angles, mask, ids, None)
            expected.append(reference.lm_head(h)[0].numpy())
    hidden = transformer.forward(params, tokens, c).hidden
    found = mtp.sequential(params, hidden, targets, c)
    for depth, logits in zip(found, expected, strict=True):
        np.testing.assert_allclose(depth.logits, logits, rtol=0, atol=TOLERANCE)


def test_adamw_and_clipping(double):
    """Five clipped updates; torch clips by limit / (norm + 1e-6), hence the tolerance."""
    rng = np.random.default_rng(6)
    params = {"w": rng.normal(size=(3, 4)), "gain": rng.normal(size=4)}
    tensors = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    groups = [
        {"params": [tensors["w"]], "weight_decay": 0.1},
        {"params": [tensors["gain"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.03, betas=(0.9, 0.95), eps=1e-8)
    state = optimizer.init(params)
    for _ in range(5):
        grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(grads[name].copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        np.testing.assert_allclose(optimizer.global_norm(grads), norm.item(), rtol=1e-14)
        reference.step()
        params, state = optimizer.adamw(
            params, optimizer.clip(grads, 1.0), state, lr=0.03, decayed={"w": True, "gain": False}
        )
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=0, atol=1e-7)

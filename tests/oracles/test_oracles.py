"""The oracles by hand-made cases and by their own identities; test_against_transformers.py has the rest.

Where no other reason is given, numbers differ only by float64 rounding: TOLERANCE.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from tests.oracles import attention, balance, ffn, moe, mtp, optimizer, transformer
from tests.oracles.rope import make_rope, rotate
from tests.oracles.tree import Tree, float64, tree_map

TOLERANCE = 1e-12
CONFIG = ModelConfig(
    vocab_size=17,
    d_model=8,
    n_layers=2,
    d_ff=12,
    attention=AttentionConfig(
        n_heads=2, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=3
    ),
    rope=RopeConfig(theta=100.0, yarn_factor=4.0, yarn_original_len=8),
    moe=MoEConfig(n_experts=4, top_k=2, d_ff_expert=6, n_groups=2, topk_groups=1),
)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def random_attn(rng: np.random.Generator, d: int, a: AttentionConfig) -> Tree:
    n, nope, rope = a.n_heads, a.qk_nope_head_dim, a.qk_rope_head_dim
    inputs = a.q_lora_rank or d
    p = {
        "w_qr": rng.normal(size=(inputs, n, rope)),
        "w_dkv": rng.normal(size=(d, a.kv_lora_rank)),
        "kv_norm": rng.uniform(0.5, 1.5, a.kv_lora_rank),
        "w_kr": rng.normal(size=(d, rope)),
        "w_uk": rng.normal(size=(a.kv_lora_rank, n, nope)),
        "w_uv": rng.normal(size=(a.kv_lora_rank, n, a.v_head_dim)),
        "w_o": rng.normal(size=(n, a.v_head_dim, d)),
    }
    query = rng.normal(size=(inputs, n, nope))
    if not a.q_lora_rank:
        return p | {"w_q": query}
    w_dq, q_norm = rng.normal(size=(d, a.q_lora_rank)), rng.uniform(0.5, 1.5, a.q_lora_rank)
    return p | {"w_uq": query, "w_dq": w_dq, "q_norm": q_norm}


def random_ffn(rng: np.random.Generator, d: int, width: int) -> Tree:
    shapes = {"w_gate": (d, width), "w_up": (d, width), "w_down": (width, d)}
    return {name: rng.normal(size=shape) * 0.3 for name, shape in shapes.items()}


def random_layer(rng: np.random.Generator, c: ModelConfig, dense: bool = False) -> Tree:
    d, m = c.d_model, c.moe
    p = random_ffn(rng, d, c.d_ff)
    if not dense:
        p = {"w_router": rng.normal(size=(d, m.n_experts)), "bias": rng.normal(size=m.n_experts) * 0.2}
        p["experts"] = [random_ffn(rng, d, m.d_ff_expert) for _ in range(m.n_experts)]
        p["shared"] = [random_ffn(rng, d, m.d_ff_expert) for _ in range(m.n_shared)]
    norms = {name: rng.uniform(0.5, 1.5, d) for name in ("attn_norm", "ffn_norm")}
    return norms | {"attn": random_attn(rng, d, c.attention), "ffn": p}


def random_params(c: ModelConfig, depths: int = 0, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    d = c.d_model
    params = {"embed": rng.normal(size=(c.vocab_size, d)), "head": rng.normal(size=(d, c.vocab_size))}
    params["final_norm"] = rng.uniform(0.5, 1.5, d)
    params["layers"] = [random_layer(rng, c, dense=n < c.moe.n_dense_layers) for n in range(c.n_layers)]
    params["mtp"] = []
    for _ in range(depths):
        norms = {name: rng.uniform(0.5, 1.5, d) for name in ("enorm", "hnorm", "norm")}
        depth = norms | {"eh_proj": rng.normal(size=(2 * d, d)), "block": random_layer(rng, c)}
        params["mtp"].append(depth)
    return params


def test_rotation_by_a_quarter_turn():
    rope = make_rope(4)._replace(inv_freq=np.array([math.pi / 2, 0.0]))
    assert_close(rotate(np.array([1.0, 2.0, 3.0, 4.0]), 1, rope), [-2, 1, 3, 4])
    assert_close(rotate(np.array([1.0, 2.0, 3.0, 4.0]), 1, rope._replace(interleaved=False)), [-3, 2, 1, 4])


@pytest.mark.parametrize("q_lora_rank", [0, 6])
@pytest.mark.parametrize("segment_ids", [None, np.array([0, 0, 0, 1, 1, 1, 1])])
def test_absorbed_equals_expanded(q_lora_rank, segment_ids):
    rng = np.random.default_rng(0)
    a = replace(CONFIG.attention, q_lora_rank=q_lora_rank)
    x, p = rng.normal(size=(7, CONFIG.d_model)), random_attn(rng, CONFIG.d_model, a)
    rope, positions = transformer.rope_of(CONFIG.rope, a.qk_rope_head_dim), np.array([3, 4, 5, 0, 1, 2, 3])
    expanded = attention.mla(x, p, rope, positions=positions, segment_ids=segment_ids)
    absorbed = attention.mla_absorbed(x, p, rope, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(absorbed, expanded, rtol=1e-11)
    assert np.max(np.abs(expanded - attention.mla(x, p, rope))) > 0.01  # Positions and segments matter.


def test_float32_parameters_are_computed_in_float64():
    rng = np.random.default_rng(1)
    params, tokens = tree_map(np.float32, random_params(CONFIG)), rng.integers(0, CONFIG.vocab_size, 5)
    logits = transformer.forward(params, tokens, CONFIG).logits
    assert logits.dtype == np.float64
    np.testing.assert_array_equal(logits, transformer.forward(float64(params), tokens, CONFIG).logits)


def route(scores, bias=None, **options):
    """Routes one token of the given sigmoid scores."""
    scores = np.array(scores)
    return moe.route(np.log(scores / (1 - scores))[None], np.eye(len(scores)), bias, **options)


def test_negative_biased_scores_keep_their_group():
    # s + b is [-.1, -.2 | -.3, -.4]: group 0 wins. A mask of 0 would send the token to experts 2 and 3.
    found = route([0.9, 0.8, 0.7, 0.6], np.full(4, -1.0), top_k=2, n_groups=2, topk_groups=1, scale=2.0)
    assert found.selected.tolist() == [[0, 1]]
    assert_close(found.gates, [[2 * 0.9 / 1.7, 2 * 0.8 / 1.7]])  # Gates know no bias.
    assert found.counts.tolist() == [1, 1, 0, 0]


def test_bias_steers_selection_only():
    found = route([0.9, 0.5, 0.4, 0.1], np.array([0, 0, 0, 0.7]), top_k=2, normalize=False)
    assert found.selected.tolist() == [[0, 3]]
    assert_close(found.gates, [[0.9, 0.1]])


def test_group_scores():
    scores, options = [0.9, 0.1, 0.6, 0.5], {"top_k": 1, "n_groups": 2, "topk_groups": 1}
    assert route(scores, **options, group_score="top2_sum").selected.tolist() == [[2]]  # 1.0 < 1.1
    assert route(scores, **options, group_score="max").selected.tolist() == [[0]]  # 0.9 > 0.6


def test_ties_go_to_the_lower_index():
    assert route([0.5] * 6, top_k=2).selected.tolist() == [[0, 1]]
    assert route([0.5] * 6, top_k=3, n_groups=3, topk_groups=2).selected.tolist() == [[0, 1, 2]]
    assert route([0.4, 0.5, 0.5, 0.5], top_k=2).selected.tolist() == [[1, 2]]


def test_top_k_beyond_the_groups_is_refused():
    with pytest.raises(ValueError, match="k=3 of 2 candidates"):
        route([0.5] * 4, top_k=3, n_groups=2, topk_groups=1)


def test_shared_experts_are_summed():
    """Two narrow shared experts are one wide one."""
    rng = np.random.default_rng(2)
    p, x = (
        random_layer(rng, replace(CONFIG, moe=replace(CONFIG.moe, n_shared=2)))["ffn"],
        rng.normal(size=(5, 8)),
    )
    first, second = p["shared"]
    axes = {"w_gate": 1, "w_up": 1, "w_down": 0}
    wide = {name: np.concatenate([first[name], second[name]], axis) for name, axis in axes.items()}
    narrow_out, routing = moe.moe(x, p, top_k=2)
    assert_close(narrow_out, moe.moe(x, p | {"shared": [wide]}, top_k=2)[0])
    assert_close(narrow_out - ffn.swiglu(x, wide), moe.moe(x, p | {"shared": []}, top_k=2)[0])
    assert routing.counts.sum() == 5 * 2


def test_v3_balance_losses():
    a, b, c = [0.8, 0.2, 0.4, 0.6], [0.1, 0.5, 0.2, 0.2], [0.4, 0.1, 0.3, 0.2]
    # First sequence: f = [2, 2, 0, 0], P = [.25, .3, ...]. Second: f = [4, 0, 0, 0], P = [.4, ...].
    assert_close(balance.sequence_loss(np.array([[a, b], [a, c]]), top_k=1), (1.1 + 1.6) / 2)
    # All four tokens: f = [3, 1, 0, 0], P = [.325, .2, ...].
    assert_close(balance.batch_loss(np.array([[a, b], [a, c]]), top_k=1), 1.175)
    assert_close(
        balance.sequence_loss(np.ones((1, 3, 4)) - np.eye(4)[:3] * 0.5, top_k=4), 1.0
    )  # All selected.


def test_v2_balance_losses():
    scores = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]], [[0.4, 0.3, 0.2, 0.1]] * 2])
    selected = np.array([[[0, 1], [3, 1]], [[0, 1], [1, 0]]])
    # f = [1, 2, 0, 1] and P = [.25, .2, .2, .35]; f = [2, 2, 0, 0] and P = [.4, .3, .2, .1].
    assert_close(balance.expert_loss(scores, selected), (1.0 + 1.4) / 2)
    # f' = [1.5, .5] and P' = [.45, .55]; f' = [2, 0] and P' = [.7, .3].
    assert_close(balance.device_loss(scores, selected, n_groups=2), (0.95 + 1.4) / 2)
    # Tokens to the devices: [2, 1] and [2, 0], so f'' = [1, .5] and [1, 0].
    assert_close(balance.communication_loss(scores, selected, n_groups=2, topk_groups=2), (0.725 + 0.7) / 2)


def test_bias_update_and_violation():
    assert balance.max_violation(np.array([4, 0, 2, 2])) == 1.0
    bias = np.array([1.0, 0.0, 0.0, 0.0])
    found = balance.bias_after_steps(bias, np.array([[4, 0, 2, 2], [1, 1, 3, 3]]), [0.1, 0.01])
    assert_close(found, [0.91, 0.11, -0.01, -0.01])
    assert bias[0] == 1.0  # The argument is left alone.


def test_cross_entropy():
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]])
    assert_close(transformer.cross_entropy(logits, np.array([2, 0])), math.log(4) / 2)
    assert_close(transformer.cross_entropy(logits, np.array([2, 1]), np.array([False, True])), 1000.0)
    assert transformer.cross_entropy(logits, np.array([2, 0]), np.zeros(2, bool)) == 0.0


def test_dense_layers_must_come_first():
    params = random_params(CONFIG)
    params["layers"].reverse()
    with pytest.raises(ValueError, match="n_dense_layers"):
        transformer.forward(params, np.arange(3), CONFIG)


def test_mtp_positions_that_count():
    """Two packed documents of three tokens; the first's last target is another document's and masked."""
    segment_ids, loss_mask = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 0, 1, 1, 1], bool)
    table = {0: [1, 1, 0, 1, 1, 1], 1: [1, 0, 0, 1, 1], 2: [0, 0, 0, 1], 3: [0, 0, 0]}
    for k, expected in table.items():
        assert mtp.counted(k, segment_ids, loss_mask).astype(int).tolist() == expected


def test_mtp_targets():
    """At depth k position i is scored on t_{i+k+1}, and only where it counts."""
    text = np.array([3, 1, 4, 1, 5, 9, 2])
    segment_ids, loss_mask = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 0, 1, 1, 1], bool)
    depths = []
    for k, counted in ((1, [0, 3, 4]), (2, [3])):
        logits = np.zeros((6 - k, 10))
        for i in range(6 - k):
            logits[i, text[i + k + 1] if i in counted else 7] = 50.0 * k
        depths.append(mtp.Depth(logits, np.zeros((6 - k, 1)), None))
    losses = mtp.depth_losses(depths, text[1:], segment_ids, loss_mask)
    assert_close(losses, [math.log1p(9 * math.exp(-50)), math.log1p(9 * math.exp(-100))])
    assert_close(mtp.mtp_loss([1.0, 3.0], 0.3), 0.6)


def rows_changed(before: list[mtp.Depth], after: list[mtp.Depth]) -> list[list[int]]:
    changed = [np.any(a.logits != b.logits, axis=1) for a, b in zip(before, after, strict=True)]
    return [np.flatnonzero(rows).tolist() for rows in changed]


def test_mtp_reads_the_right_tokens():
    """Row i of depth k reads all of h^0 up to row i, and all tokens from t_1 up to t_{i+k}."""
    params, seq = random_params(CONFIG, depths=2), 6
    rng = np.random.default_rng(3)
    hidden, targets = rng.normal(size=(seq, CONFIG.d_model)), np.array([1, 2, 3, 4, 5, 6])
    before = mtp.sequential(params, hidden, targets, CONFIG)
    assert [depth.logits.shape for depth in before] == [(5, 17), (4, 17)]
    for j in range(seq):
        changed = targets.copy()
        changed[j] = 11  # Token t_{j+1}.
        found = rows_changed(before, mtp.sequential(params, hidden, changed, CONFIG))
        assert found == [list(range(j, 5)), list(range(max(j - 1, 0), 4))]
        moved = hidden.copy()
        moved[j] = rng.normal(size=CONFIG.d_model)
        found = rows_changed(before, mtp.sequential(params, moved, targets, CONFIG))
        assert found == [list(range(j, 5)), list(range(j, 4))]


def test_mtp_documents_do_not_mix():
    """Positions that count see nothing of another document, at any depth."""
    params, segment_ids = random_params(CONFIG, depths=2), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    rng = np.random.default_rng(4)
    hidden, targets = rng.normal(size=(8, CONFIG.d_model)), rng.integers(0, 10, 8)
    loss_mask = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    before = mtp.sequential(params, hidden, targets, CONFIG, segment_ids=segment_ids)
    for document, others in ((0, slice(3, 8)), (1, slice(0, 4))):
        changed, moved = targets.copy(), hidden.copy()
        changed[others] = 16
        if document == 1:
            changed[3] = targets[3]  # t_4 is the second document's first token.
        moved[segment_ids != document] += 1.0
        after = mtp.sequential(params, moved, changed, CONFIG, segment_ids=segment_ids)
        for k, (a, b) in enumerate(zip(before, after, strict=True), start=1):
            rows = mtp.counted(k, segment_ids, loss_mask) & (segment_ids[:-k] == document)
            assert rows.any()
            np.testing.assert_array_equal(a.logits[rows], b.logits[rows])
            assert np.any(a.logits != b.logits)


def test_parallel_heads_are_independent():
    params = random_params(CONFIG, depths=2)
    hidden = np.random.default_rng(5).normal(size=(5, CONFIG.d_model))
    both = mtp.parallel(params, hidden, CONFIG)
    for k in range(2):
        alone = mtp.parallel(params | {"mtp": [params["mtp"][k]]}, hidden, CONFIG)[0]
        np.testing.assert_array_equal(both[k].logits, alone.logits)
    changed = hidden.copy()
    changed[3] += 1.0
    assert rows_changed(both, mtp.parallel(params, changed, CONFIG)) == [[3, 4], [3, 4]]


def test_adamw_first_step():
    """Bias correction makes the first update the gradient's sign; decay is decoupled from it."""
    params, grads = (
        {"w": np.array([2.0, -1.0]), "gain": np.array([4.0])},
        {"w": np.array([3.0, -0.1]), "gain": [0.0]},
    )
    new, state = optimizer.adamw(
        params, grads, optimizer.init(params), lr=0.1, eps=1e-300, decayed={"w": True, "gain": False}
    )
    assert_close(new["w"], [2.0 - 0.1 * (1 + 0.2), -1.0 - 0.1 * (-1 - 0.1)])
    assert_close(new["gain"], [4.0])
    assert state.step == 1


def test_clipping():
    clipped = optimizer.clip({"a": np.array([3.0]), "b": np.array([[4.0]])}, 1.0)
    assert_close([clipped["a"][0], clipped["b"][0, 0]], [0.6, 0.8])
    assert_close(optimizer.clip({"a": np.array([0.3])}, 1.0)["a"], [0.3])

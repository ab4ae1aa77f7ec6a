"""The whole model, forward and backward, against float64 numpy written from the equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.model.transformer import REMAT, merge_router_counts
from dsv3_jax.training.losses import denominators, losses
from tests.model.translate import to_oracle
from tests.oracles import balance, mtp, transformer
from tests.oracles.gradient import directional_derivative
from tests.oracles.tree import tree_map

SMALL = ModelConfig(
    vocab_size=29,
    d_model=16,
    n_layers=3,
    d_ff=24,
    init_std=0.3,
    attention=AttentionConfig(
        n_heads=2,
        q_lora_rank=10,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_kv_heads=1,
        head_dim=8,
    ),
    moe=MoEConfig(n_experts=8, top_k=3, d_ff_expert=7, n_groups=4, topk_groups=2, sequence_loss=0.5),
    mtp=MTPConfig(depth=2),
)


def changed(attention=None, moe=None, mtp=None, rope=None, **model):
    sections = {"attention": attention, "moe": moe, "mtp": mtp, "rope": rope}
    replaced = {
        name: dataclasses.replace(getattr(SMALL, name), **values) for name, values in sections.items() if values
    }
    return dataclasses.replace(SMALL, **replaced, **model)


YARN = {"yarn_factor": 4.0, "yarn_original_len": 8, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.25}
CONFIGS = {
    "v3": changed(rope=YARN | {"yarn_mscale": 0.7}),
    "v2": changed(
        attention={"q_lora_rank": 0},
        moe={
            "gate": "softmax",
            "group_score": "max",
            "normalize_gates": False,
            "n_shared": 2,
            "routed_scale": 4.0,
            "n_dense_layers": 0,
            "sequence_loss": 0.0,
            "batch_loss": 0.3,
            "expert_loss": 0.2,
            "device_loss": 0.4,
            "communication_loss": 0.1,
        },
        mtp={"depth": 0},
    ),
    "gqa_dense": changed(
        attention={"kind": "gqa", "n_heads": 4, "n_kv_heads": 2},
        moe={"n_dense_layers": 3},
        mtp={"depth": 1},
        rope={"interleaved": False},
        tie_embeddings=True,
    ),
    "mqa_parallel": changed(attention={"kind": "mqa"}, mtp={"kind": "parallel"}, moe={"n_shared": 0}),
    "mha_moe": changed(attention={"kind": "mha"}, mtp={"depth": 0}, rope={"interleaved": False} | YARN),
}
SEQ = 7


def make_batch(config, packed):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (2, SEQ + 1)).astype(np.int32)
    segments = np.ones((2, SEQ), np.int32)
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (2, SEQ)).copy()
    mask = np.ones((2, SEQ), bool)
    if packed:
        for row, cut in enumerate((3, 5)):
            segments[row, cut:] = 2
            positions[row, cut:] -= cut
            mask[row, cut - 1] = False
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segment_ids": segments,
        "loss_mask": mask,
    }


def make_variables(model):
    rng = np.random.default_rng(7)
    shapes = meta.unbox(jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0)))

    # Norms away from 1 and a router bias that changes the selection, so that both are seen.
    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + model.config.init_std * rng.standard_normal(leaf.shape), jnp.float32)

    return {"router": {}} | jax.tree_util.tree_map_with_path(draw, shapes)


def our_losses(model, variables, batch, mtp_weight=0.3):
    outputs = model.apply(
        variables, batch["tokens"], batch["positions"], batch["segment_ids"], batch["targets"]
    )
    totals = denominators(batch, model.config.mtp.depth)
    return losses(outputs, batch, totals, 1.0, jnp.float32(mtp_weight), 0), outputs


def oracle_losses(tree, batch, config):
    """(loss, ce, mtp by depth, balance, counts by row) by the oracles, for the whole batch."""
    size = batch["tokens"].shape[0]
    logits, counted, routing = [], [], []
    depth_logits = [([], [], []) for _ in range(config.mtp.depth)]
    for b in range(size):
        where = {"positions": batch["positions"][b], "segment_ids": batch["segment_ids"][b]}
        out = transformer.forward(tree, batch["tokens"][b], config, **where)
        logits.append(out.logits)
        counted.append(batch["loss_mask"][b])
        rows = [r for r in out.routing if r is not None]
        if config.mtp.depth:
            if config.mtp.kind == "sequential":
                depths = mtp.sequential(tree, out.hidden, batch["targets"][b], config, **where)
            else:
                depths = mtp.parallel(tree, out.hidden, config, **where)
            for k, depth in enumerate(depths, start=1):
                valid = mtp.counted(k, where["segment_ids"], batch["loss_mask"][b])
                collected = depth_logits[k - 1]
                collected[0].append(depth.logits[: len(valid)])
                collected[1].append(batch["targets"][b][k:])
                collected[2].append(valid)
                if depth.routing is not None:
                    rows.append(depth.routing)
        routing.append(rows)
    ce = transformer.cross_entropy(
        np.concatenate(logits), np.concatenate(list(batch["targets"])), np.concatenate(counted)
    )
    by_depth = [transformer.cross_entropy(*map(np.concatenate, parts)) for parts in depth_logits]
    total_balance, counts, c = 0.0, [], config.moe
    for row in range(len(routing[0])):
        scores = np.stack([routing[b][row].scores for b in range(size)])
        selected = np.stack([routing[b][row].selected for b in range(size)])
        counts.append(sum(routing[b][row].counts for b in range(size)))
        total_balance += c.sequence_loss * balance.sequence_loss(scores, c.top_k)
        total_balance += c.batch_loss * balance.batch_loss(scores, c.top_k)
        total_balance += c.expert_loss * balance.expert_loss(scores, selected)
        total_balance += c.device_loss * balance.device_loss(scores, selected, c.n_groups)
        total_balance += c.communication_loss * balance.communication_loss(
            scores, selected, c.n_groups, c.topk_groups
        )
    loss = ce + total_balance + (mtp.mtp_loss(by_depth, 0.3) if by_depth else 0.0)
    return loss, ce, by_depth, total_balance, counts


@functools.cache  # Packed and unpacked batches share a compilation.
def loss_and_gradients(name):
    model = Transformer(CONFIGS[name])

    def loss(params, router, batch):
        parts, outputs = our_losses(model, {"params": params, "router": router}, batch)
        return parts.loss, (parts, outputs.counts)

    return model, jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_counts_and_gradients(name, packed):
    config = CONFIGS[name]
    model, ours = loss_and_gradients(name)
    batch = make_batch(config, packed)
    variables = make_variables(model)
    (_, (parts, counts)), grads = ours(variables["params"], variables["router"], batch)
    tree = to_oracle(variables["params"], variables["router"], config)
    loss, ce, by_depth, balance_loss, oracle_counts = oracle_losses(tree, batch, config)

    # float32 against float64: a few hundred roundings of 6e-8 on values near 3.
    np.testing.assert_allclose(parts.ce_loss, ce, rtol=1e-5)
    np.testing.assert_allclose(parts.mtp_loss, by_depth, rtol=1e-5)
    np.testing.assert_allclose(parts.balance_loss, balance_loss, rtol=1e-5)
    np.testing.assert_allclose(parts.loss, loss, rtol=1e-5)
    np.testing.assert_array_equal(counts, np.array(oracle_counts).reshape(counts.shape))

    # The gradient along two random directions; the oracle differentiates by central differences.
    rng = np.random.default_rng(3)
    gradient = to_oracle(grads, None, config)
    plain = to_oracle(variables["params"], None, config)
    biased = to_oracle(variables["params"], variables["router"], config)

    def with_bias(t):
        for ours_, theirs in zip(_moe_parts(t), _moe_parts(biased), strict=True):
            ours_["bias"] = theirs["bias"]
        return t

    for _ in range(2):
        along = tree_map(lambda x: rng.standard_normal(x.shape) / 10, plain)
        slope = directional_derivative(
            lambda t: oracle_losses(with_bias(tree_map(np.copy, t)), batch, config)[0], plain, along, 1e-5
        )
        expected = sum(np.vdot(g, a) for g, a in zip(_leaves(gradient), _leaves(along), strict=True))
        size = sum(np.abs(g * a).sum() for g, a in zip(_leaves(gradient), _leaves(along), strict=True))
        # Relative to the sum of magnitudes, since the terms cancel: float32 rounding of each term.
        assert abs(slope - expected) < 1e-5 * size


def _moe_parts(tree):
    layers = tree["layers"] + [depth["block"] for depth in tree["mtp"]]
    return [layer["ffn"] for layer in layers if "w_router" in layer["ffn"]]


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for name in sorted(tree) for leaf in _leaves(tree[name])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [np.asarray(tree, np.float64)]


def test_remat_policies_give_the_same_gradients_and_counts():
    config = CONFIGS["v3"]
    batch = make_batch(config, False)
    results = {}
    for policy in REMAT:
        model = Transformer(config, remat=policy)
        variables = make_variables(model)

        def loss(params, model=model, variables=variables):
            parts, outputs = our_losses(model, variables | {"params": params}, batch)
            return parts.loss, outputs.counts

        results[policy] = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    (loss, counts), grads = results["none"]
    for policy in ("full", "dots", "v3"):
        (other_loss, other_counts), other_grads = results[policy]
        np.testing.assert_array_equal(counts, other_counts)
        np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
            # The same operations in another fusion: rounding only.
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * np.abs(ours).max())


def test_counts_find_their_way_to_the_bias_of_their_layer():
    model = Transformer(CONFIGS["v3"])
    router = make_variables(model)["router"]
    counts = np.arange(4 * 8).reshape(4, 8)  # Two MoE layers and two prediction depths.
    merged = merge_router_counts(router, counts)
    np.testing.assert_array_equal(merged["moe_layers"]["moe"]["bias"], counts[:2])
    np.testing.assert_array_equal(merged["mtp_1"]["block"]["moe"]["bias"], counts[2])
    np.testing.assert_array_equal(merged["mtp_2"]["block"]["moe"]["bias"], counts[3])

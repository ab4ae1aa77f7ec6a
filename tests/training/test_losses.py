"""Cross-entropy in chunks, and which targets count at each prediction depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import Outputs
from dsv3_jax.training.losses import cross_entropy, denominators, losses, shifted
from tests.oracles import mtp, transformer

BATCH, SEQ, D, VOCAB = 3, 12, 8, 17


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(BATCH, SEQ, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (BATCH, SEQ)) / 2, jnp.float32)  # 0, a half, 1.
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights):
    """(loss, d hidden, d head) in float64: the gradient of the logits is (softmax - one-hot) * weight."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    p = exponentials / exponentials.sum(-1, keepdims=True)
    hit = np.eye(VOCAB)[np.asarray(targets)]
    dlogits = (p - hit) * weights[..., None]
    total = -(np.log((p * hit).sum(-1)) * weights).sum()
    return total, dlogits @ head.T, np.einsum("bsd,bsv->dv", hidden, dlogits)


@pytest.mark.parametrize("chunk", [0, 4, 1, SEQ])
def test_chunked_cross_entropy(chunk):
    hidden, head, targets, weights = inputs()
    expected = plain(hidden, head, targets, weights)

    @jax.jit
    def ours(hidden, head):
        return jax.value_and_grad(lambda h, w: 3.0 * cross_entropy(h, w, targets, weights, chunk), (0, 1))(
            hidden, head
        )

    value, (dhidden, dhead) = ours(hidden, head)
    # float32 sums over 36 positions of terms near 10.
    np.testing.assert_allclose(value, 3 * expected[0], rtol=1e-5)
    np.testing.assert_allclose(dhidden, 3 * expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dhead, 3 * expected[2], rtol=1e-4, atol=1e-5)
    undifferentiated = jax.jit(cross_entropy, static_argnums=4)(hidden, head, targets, weights, chunk)
    np.testing.assert_allclose(undifferentiated, expected[0], rtol=1e-5)
    assert not np.asarray(dhidden)[np.asarray(weights) == 0].any()


def test_bfloat16_activations():
    """Logits, loss and the head's gradient stay float32; the gradient of hidden has its dtype."""
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = plain(hidden.astype(jnp.float32), rounded, targets, weights)
    value, (dhidden, dhead) = jax.value_and_grad(
        lambda h, w: cross_entropy(h, w, targets, weights, 4), (0, 1)
    )(hidden, head)
    assert value.dtype == dhead.dtype == jnp.float32 and dhidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)  # Products of bf16 are exact in float32.
    for ours, theirs in ((dhidden, expected[1]), (dhead, expected[2])):
        # The gradient of the logits is rounded to bf16 once: 2^-9 of each of its terms, plus the result.
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())


def test_large_logits_stay_finite():
    hidden = jnp.full((1, 2, 1), 1e4)
    head, targets = jnp.asarray([[1.0, -1.0]]), jnp.asarray([[0, 1]], jnp.int32)
    value, gradient = jax.value_and_grad(cross_entropy)(hidden, head, targets, jnp.ones((1, 2)), 0)
    assert value == 2e4 and np.isfinite(gradient).all()


# Two packed documents, a b c d | e f g h, and the target of each position. The last target of the first
# document is the second's first token: masked. So is that of the last position, which the window cuts.
TOKENS = "abcdefgh"
ALIGNMENT = {  # depth: for each position its target, or "." where none counts
    0: "bcd.fgh.",
    1: "cd..gh..",
    2: "d...h...",
    3: "........",
}


def aligned_batch():
    ids = np.array([[ord(c) for c in TOKENS]], np.int32)
    return {
        "tokens": jnp.asarray(ids),
        "targets": jnp.asarray(np.append(ids[:, 1:], [[ord("!")]], 1).astype(np.int32)),
        "positions": jnp.asarray([[0, 1, 2, 3] * 2], jnp.int32),
        "segment_ids": jnp.asarray([[1] * 4 + [2] * 4], jnp.int32),
        "loss_mask": jnp.asarray([[c != "." for c in ALIGNMENT[0]]]),
    }


@pytest.mark.parametrize("depth", ALIGNMENT)
def test_alignment_table_of_multi_token_prediction(depth):
    """At depth k position i predicts token i+k+1 (DeepSeek-V3 eq 23), in its own document only."""
    batch = aligned_batch()
    targets, mask = shifted(batch, depth)
    shown = "".join(chr(t) if m else "." for t, m in zip(targets[0], mask[0], strict=True))
    assert shown == ALIGNMENT[depth]
    segments, counted = np.asarray(batch["segment_ids"][0]), np.asarray(batch["loss_mask"][0])
    np.testing.assert_array_equal(mask[0][: 8 - depth], mtp.counted(depth, segments, counted))


def test_denominators_cover_the_whole_step():
    """All leading axes; a depth without any target divides by 1 and not by 0."""
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), aligned_batch())  # [micro-batches, rows, seq]
    expected = [sum(c != "." for c in row) * 2 for row in ALIGNMENT.values()]
    np.testing.assert_array_equal(denominators(batch, 3), np.maximum(expected, 1))


def test_micro_batches_add_up_to_the_loss_of_the_step():
    """Rows with different numbers of targets: averages of averages would be wrong."""
    rng = np.random.default_rng(1)
    hidden, head, targets, _ = inputs()
    mtp_hidden = jnp.asarray(rng.normal(size=hidden.shape), jnp.float32)
    mask = jnp.asarray(rng.random((BATCH, SEQ)) < [[0.9], [0.5], [0.2]])
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (BATCH, SEQ))), jnp.int32)
    batch = {"tokens": targets, "targets": targets, "positions": targets}
    batch |= {"segment_ids": segments, "loss_mask": mask}
    totals, weight = denominators(batch, 1), jnp.float32(0.3)

    def part(rows, share):
        outputs = Outputs(
            hidden[rows], (mtp_hidden[rows],), head, jnp.zeros((0, 8), jnp.int32), jnp.float32(share)
        )
        micro = {name: x[rows] for name, x in batch.items()}
        return losses(outputs, micro, totals, share, weight, 0)

    found = jax.tree.map(lambda *x: sum(x), *(part(slice(i, i + 1), 1 / BATCH) for i in range(BATCH)))
    flat = [np.asarray(x).reshape(-1, *x.shape[2:]) for x in (hidden @ head, targets, mask)]
    ce = transformer.cross_entropy(*flat)
    logits, valid = np.asarray(mtp_hidden @ head), []
    for b in range(BATCH):
        valid.append(mtp.counted(1, np.asarray(segments[b]), np.asarray(mask[b])))
    later = np.concatenate([np.asarray(targets[b])[1:] for b in range(BATCH)])
    rows = np.concatenate([logits[b][:-1] for b in range(BATCH)])
    depth1 = transformer.cross_entropy(rows, later, np.concatenate(valid))
    np.testing.assert_allclose(found.ce_loss, ce, rtol=1e-5)  # float32 sums of 36 terms.
    np.testing.assert_allclose(found.mtp_loss, [depth1], rtol=1e-5)
    np.testing.assert_allclose(found.balance_loss, 1 / BATCH, rtol=1e-6)
    np.testing.assert_allclose(found.loss, ce + 0.3 * depth1 + 1 / BATCH, rtol=1e-5)

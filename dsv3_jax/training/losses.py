"""Cross-entropy of the main model and of multi-token prediction (DeepSeek-V3 §2.2, eqs 24-25).

Every loss is a sum over tokens divided by a denominator of the whole step, so that micro-batches and
shards add up to the loss of the global batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model import Outputs

Batch = dict[str, Array]  # tokens, targets, positions, segment_ids: int32; loss_mask: bool; [batch, seq].


class Losses(NamedTuple):
    """The parts of the loss, all float32."""

    loss: Float[Array, ""]  # What is minimised: ce + MTP weight / D * sum of mtp + balance.
    ce_loss: Float[Array, ""]  # Nats a token.
    mtp_loss: Float[Array, " depth"]  # Nats a token, one a depth.
    balance_loss: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "batch seq d"],
    head: Float[Array, "d vocab"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    chunk: int,
) -> Float[Array, ""]:
    """Weighted sum of the cross-entropy of `softmax(hidden @ head)`, float32.

    The logits of `chunk` positions of the sequence exist at once (0: of all). Under differentiation the
    forward pass already computes both gradients, so that no logits are kept or computed again.
    """
    return _chunked(hidden, head, targets, weights, chunk, with_gradients=False)[0]


def _cross_entropy_fwd(hidden, head, targets, weights, chunk):
    total, gradients = _chunked(hidden, head, targets, weights, chunk, with_gradients=True)
    return total, gradients


def _cross_entropy_bwd(chunk, gradients, g):
    dhidden, dhead = gradients
    return (g * dhidden).astype(dhidden.dtype), g * dhead, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _chunked(hidden, head, targets, weights, chunk, *, with_gradients):
    batch, seq, width = hidden.shape
    chunk = chunk or seq
    matrix = head.astype(hidden.dtype)

    def one(total_dhead, piece):
        x, target, weight = piece
        logits = jnp.einsum("bsd,dv->bsv", x, matrix, preferred_element_type=jnp.float32)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        hit = target[..., None] == jnp.arange(logits.shape[-1])
        right = jnp.where(hit, logits, 0).sum(-1)
        total, dhead = total_dhead
        total += jnp.sum(weight * (log_total - right))
        if not with_gradients:
            return (total, dhead), None
        dlogits = ((jnp.exp(logits - log_total[..., None]) - hit) * weight[..., None]).astype(x.dtype)
        dx = jnp.einsum("bsv,dv->bsd", dlogits, matrix)
        dhead += jnp.einsum("bsd,bsv->dv", x, dlogits, preferred_element_type=jnp.float32)
        return (total, dhead), dx

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape if with_gradients else (), jnp.float32))
    if chunk == seq:
        (total, dhead), dx = one(start, (hidden, targets, weights))
        return total, (dx, dhead)
    pieces = [
        jnp.moveaxis(x.reshape(batch, seq // chunk, chunk, *x.shape[2:]), 1, 0)
        for x in (hidden, targets, weights)
    ]
    (total, dhead), dx = lax.scan(one, start, pieces)
    if dx is not None:
        dx = jnp.moveaxis(dx, 0, 1).reshape(batch, seq, width)
    return total, (dx, dhead)


def shifted(batch: Batch, depth: int) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Targets of a prediction depth, and which of them count.

    Depth 0 is the main model. At depth k position i predicts token i+k+1 (eq 23), which is the target
    of position i+k; it counts when that one counts and both are of one document.
    """
    targets, mask, segments = batch["targets"], batch["loss_mask"], batch["segment_ids"]
    if depth == 0:
        return targets, mask
    pad = ((0, 0), (0, depth))
    same = segments == jnp.pad(segments[:, depth:], pad, constant_values=-1)
    return jnp.pad(targets[:, depth:], pad), jnp.pad(mask[:, depth:], pad) & same


def denominators(batch: Batch, depth: int) -> Float[Array, " depths"]:
    """Targets that count at depths 0 to `depth`, float32, over all leading axes of the batch."""
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    counts = [shifted(flat, k)[1].sum(dtype=jnp.float32) for k in range(depth + 1)]
    return jnp.maximum(jnp.stack(counts), 1.0)


def losses(
    outputs: Outputs,
    batch: Batch,
    totals: Float[Array, " depths"],
    share: float | Float[Array, ""],
    mtp_weight: Float[Array, ""],
    chunk: int,
) -> Losses:
    """This micro-batch's part of the losses of the step.

    Args:
      outputs: of the model, on this micro-batch.
      batch: the micro-batch.
      totals: `denominators` of the whole step.
      share: this micro-batch's share of the step's sequences, which weighs the balance loss.
      mtp_weight: lambda of eq 25.
      chunk: positions whose logits exist at once.
    """
    sums = []
    for depth, hidden in enumerate((outputs.hidden, *outputs.mtp_hidden)):
        targets, mask = shifted(batch, depth)
        sums.append(cross_entropy(hidden, outputs.head, targets, mask.astype(jnp.float32), chunk))
    means = jnp.stack(sums) / totals[: len(sums)]
    ce_loss, mtp_loss = means[0], means[1:]
    balance = outputs.balance_loss * share
    loss = ce_loss + balance
    if mtp_loss.size:
        loss += mtp_weight * mtp_loss.mean()
    return Losses(loss, ce_loss, mtp_loss, balance)

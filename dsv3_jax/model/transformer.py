"""The whole model: embedding, dense layers, MoE layers, final norm, and the multi-token prediction blocks.

Layers of one kind are scanned: their parameters are stacked on a leading `layers` axis, so that
compile time does not grow with depth.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import FP8Config, ModelConfig
from dsv3_jax.model.attention import attention_module, rope_dim
from dsv3_jax.model.layers import FFN, RMSNorm, linear, weight
from dsv3_jax.model.moe import MoE, RouterReport
from dsv3_jax.model.rope import rotation
from dsv3_jax.parallel.gather import KEPT
from dsv3_jax.parallel.mesh import constrain

# What each remat policy keeps for the backward pass; all else inside a block is computed again.
# "v3" recomputes the norms, the up-projections of MLA and SwiGLU (DeepSeek-V3 §3.2.3).
# Weights that ZeRO-1 has gathered stay under all of them: gathering is no computation.
_V3_SAVED = ("mla_latent", "attention_out", "attention_lse", "residual", "ffn_gate_up", "expert_gate_up")
_POLICIES = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _POLICIES.save_only_these_names(KEPT),
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(KEPT)
    ),
    "v3": _POLICIES.save_only_these_names(*_V3_SAVED, KEPT),
}


class Outputs(NamedTuple):
    """What a forward pass gives the losses."""

    hidden: Float[Array, "batch seq d"]  # After the final norm: ready for the head.
    mtp_hidden: tuple[Float[Array, "batch seq d"], ...]  # One a depth, after its own norm.
    head: Float[Array, "d vocab"]  # The output head, shared by the main model and MTP.
    counts: Int[Array, "rows experts"]  # Tokens an expert: a row for each MoE layer, then for each MTP depth.
    balance_loss: Float[Array, ""]  # Summed over those rows.


class Block(nn.Module):
    """A pre-norm transformer block, dense or MoE: `x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    config: ModelConfig
    moe: bool
    tail: int = 0  # Last positions that do not count towards the experts' load.
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, x, turn, segment_ids):
        eps = self.config.norm_eps
        x = constrain(x, "batch", None, None)
        with jax.named_scope("attention"):
            normal = RMSNorm(eps, name="attention_norm")(x)
            attention = attention_module(self.config, "attention", self.recipe)
            x = x + attention(normal, turn, segment_ids)
        x = checkpoint_name(x, "residual")
        normal = RMSNorm(eps, name="ffn_norm")(x)
        if not self.moe:
            with jax.named_scope("dense_ffn"):
                dense = FFN(self.config.d_ff, self.config.init_std, self.recipe, name="ffn")
                return x + dense(normal), None
        with jax.named_scope("moe"):
            out, report = MoE(self.config, self.tail, self.recipe, name="moe")(normal)
            return x + out, report


def _stack(
    config: ModelConfig, length: int, moe: bool, remat: str, recipe: FP8Config | None, name: str
) -> nn.Module:
    block = Block if remat == "none" else nn.remat(Block, policy=REMAT[remat], prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, moe, recipe=recipe, name=name)


class MTPBlock(nn.Module):
    """One depth of multi-token prediction (V3 §2.2, eqs 21-23).

    `h'_i = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)]`: the embedding comes first, as in the released
    weights (`eh_proj`); the paper writes the hidden state first. Every depth takes the hidden state
    that the head sees, after the norm: the released weights of depth 1 were trained so.
    """

    config: ModelConfig
    depth: int
    chained: bool  # False: an independent head on the main model's state, which sees no later token.
    remat: str
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, hidden, embedded, turn, segment_ids):
        config, tail = self.config, 0
        x = hidden
        if self.chained:
            tail = self.depth  # Eq 22 runs over the positions whose target exists.
            both = [
                RMSNorm(config.norm_eps, name="embedding_norm")(embedded),
                RMSNorm(config.norm_eps, name="hidden_norm")(hidden),
            ]
            shape, axes = (2 * config.d_model, config.d_model), ("mlp", "embed")
            merge = weight(self, "merge", shape, axes, config.init_std)
            x = linear(jnp.concatenate(both, -1), merge, self.recipe)
        moe = config.moe.n_dense_layers < config.n_layers
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])
        x, report = block(config, moe, tail, self.recipe, name="block")(x, turn, segment_ids)
        return RMSNorm(config.norm_eps, name="norm")(x), report


class Transformer(nn.Module):
    """DeepSeek-V3, and by its configuration V2, DeepSeekMoE and DeepSeek LLM.

    `dtype` is the dtype of activations and of the matrix products; parameters are float32 and cast
    where they are used. The router and the norms work in float32. With a `recipe` the products of all
    linear layers but the head are taken in FP8 (DeepSeek-V3 §3.3).
    """

    config: ModelConfig
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: str = "none"
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        targets: Int[Array, "batch seq"] | None = None,
    ) -> Outputs:
        """Runs the model over whole sequences.

        Args:
          tokens: token ids.
          positions: position of each token, 0, 1, 2... by default.
          segment_ids: tokens attend within equal ids only; None attends to the whole past.
          targets: the tokens that follow (`targets[:, i]` is token i+1). The MTP blocks, which need
            them, run only when they are given.
        """
        config = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embedding = weight(
            self, "embedding", (config.vocab_size, config.d_model), ("vocab", "embed"), config.init_std
        )
        head = embedding.T
        if not config.tie_embeddings:
            head = weight(
                self, "head", (config.d_model, config.vocab_size), ("embed", "vocab"), config.init_std
            )
        turn = rotation(config.rope, rope_dim(config.attention), positions)

        # Whole before the look-up: from a table split over `d` (FSDP) the partitioner would split the result
        # the same way, and then gather the batch to split it again. Cast after it: the gradient of a
        # frequent token is a sum of very many terms, which bf16 cannot hold.
        table = constrain(embedding, None, None)
        x = constrain(table[tokens].astype(self.dtype), "batch", None, None)
        reports: list[RouterReport] = []
        dense = min(config.moe.n_dense_layers, config.n_layers)
        if dense:
            x, _ = _stack(config, dense, False, self.remat, self.recipe, "dense_layers")(x, turn, segment_ids)
        if config.n_layers > dense:
            stack = _stack(config, config.n_layers - dense, True, self.remat, self.recipe, "moe_layers")
            x, report = stack(x, turn, segment_ids)
            reports.append(report)
        hidden = RMSNorm(config.norm_eps, name="final_norm")(x)

        mtp_hidden: list[Array] = []
        if targets is not None and config.mtp.depth:
            mtp_hidden, mtp_reports = self._mtp(hidden, targets, table, turn, segment_ids)
            reports += mtp_reports
        no_experts = jnp.zeros((0, config.moe.n_experts), jnp.int32)
        counts = jnp.concatenate([no_experts] + [r.counts.reshape(-1, config.moe.n_experts) for r in reports])
        balance = sum((r.balance_loss.sum() for r in reports), jnp.zeros((), jnp.float32))
        return Outputs(hidden, tuple(mtp_hidden), head, counts, balance)

    def _mtp(self, hidden, targets, table, turn, segment_ids):
        """The chain h^0 -> h^1 -> ... (V3 eqs 21-23), or independent blocks that all start at h^0."""
        chained = self.config.mtp.kind == "sequential"
        outputs, reports, state = [], [], hidden
        for depth in range(1, self.config.mtp.depth + 1):
            # Token i+k is the target of position i+k-1; what lies past the end is masked in the loss.
            later = jnp.pad(targets[:, depth - 1 :], ((0, 0), (0, depth - 1)))
            embedded = table[later].astype(self.dtype) if chained else None
            block = MTPBlock(self.config, depth, chained, self.remat, self.recipe, name=f"mtp_{depth}")
            state, report = block(state if chained else hidden, embedded, turn, segment_ids)
            outputs.append(state)
            if report is not None:
                reports.append(report)
        return outputs, reports


def forward(model: Transformer, variables: Any, *inputs: Array | None) -> Outputs:
    """`model.apply`, whose result Flax leaves untyped; `inputs` as of `Transformer.__call__`."""
    return cast(Outputs, model.apply(variables, *inputs))


def init_variables(model: Transformer, rng: Array, seq_len: int = 8) -> dict:
    """Parameters and router state, boxed with their logical axes (`flax.linen.Partitioned`)."""
    tokens = jnp.zeros((1, seq_len), jnp.int32)
    return dict(model.init(rng, tokens, targets=tokens))


def merge_router_counts(router: dict, counts: Int[Array, "rows experts"]) -> dict:
    """The rows of `Outputs.counts`, arranged like the router state that they update."""
    merged, start = {}, 0
    for name in sorted(router, key=lambda part: (part.startswith("mtp_"), len(part), part)):
        leaves, tree = jax.tree.flatten(router[name])
        (bias,) = leaves
        rows = bias.shape[0] if bias.ndim == 2 else 1
        merged[name] = tree.unflatten([counts[start : start + rows].reshape(bias.shape)])
        start += rows
    return merged

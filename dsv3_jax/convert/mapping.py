"""Which tensor of a Hugging Face folder is which part of which array of the model.

A *leaf* is an array of the model, with its layers (and experts) stacked on leading axes. Behind them it is
kept on disk in Hugging Face's order of axes, output features first: its *stored* order. Every tensor is then
a run of whole rows of one leaf, a row being what lies behind the first stored axis.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert.fp8 import scale_shape
from dsv3_jax.convert.shapes import Path, shapes


class Leaf(NamedTuple):
    """An array of the model and how it is stored.

    Attributes:
      path: collection, module and name.
      shape: as the model has it: leading axes, then the parameter's own.
      lead: leading axes: layers, or layers and experts, or none.
      order: the axes behind the leading ones, in stored order.
      outputs: stored axes that make the rows of Hugging Face's matrix; the others make its columns.
      parts: matrices of Hugging Face that lie one below the other in it: 2 for gate and up.
    """

    path: Path
    shape: tuple[int, ...]
    lead: int
    order: tuple[int, ...]
    outputs: int = 1
    parts: int = 1

    @property
    def block(self) -> tuple[int, ...]:
        """Stored shape of what lies behind the leading axes."""
        own = self.shape[self.lead :]
        return tuple(own[axis] for axis in self.order)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the block as Hugging Face's matrices, one below the other."""
        return math.prod(self.block[: self.outputs]), math.prod(self.block[self.outputs :])


class Tensor(NamedTuple):
    """A tensor of a Hugging Face folder.

    Attributes:
      shape: as in the folder.
      leaf: the path of the leaf that it is a part of.
      lead: along leading axes of the leaf; fewer than it has for a tensor of all experts.
      start: the first of its rows within the block.
      rows: its rows, of the leaf's first stored axis.
      copy_of: the tensor that it repeats, if it is a copy; nothing is read from a copy.
    """

    shape: tuple[int, ...]
    leaf: Path
    lead: tuple[int, ...]
    start: int
    rows: int
    copy_of: str = ""


class Layout(NamedTuple):
    """Choices that a folder makes, and that leave the model the same.

    Attributes:
      fused: the experts of a layer are two tensors (`experts.gate_up_proj`, `experts.down_proj`).
      mtp_copies: prediction layers repeat the embedding and the head.
      tied_head: a tied head is repeated.
    """

    fused: bool = False
    mtp_copies: bool = True
    tied_head: bool = False


# Inside a block: (Hugging Face names, stored order of the parameter's own axes, outputs among them).
_MATRIX, _VECTOR, _HEADS = ((1, 0), 1), ((0,), 1), ((1, 2, 0), 2)
_BLOCK: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], int]]] = {
    "attention_norm/scale": (("input_layernorm.weight",), _VECTOR),
    "attention/w_dq": (("self_attn.q_a_proj.weight",), _MATRIX),
    "attention/q_norm/scale": (("self_attn.q_a_layernorm.weight",), _VECTOR),
    "attention/w_uq_qr": (("self_attn.q_b_proj.weight",), _HEADS),
    "attention/w_dkv_kr": (("self_attn.kv_a_proj_with_mqa.weight",), _MATRIX),
    "attention/kv_norm/scale": (("self_attn.kv_a_layernorm.weight",), _VECTOR),
    "attention/w_uk_uv": (("self_attn.kv_b_proj.weight",), _HEADS),
    "attention/w_q": (("self_attn.q_proj.weight",), _HEADS),
    "attention/w_k": (("self_attn.k_proj.weight",), _HEADS),
    "attention/w_v": (("self_attn.v_proj.weight",), _HEADS),
    "attention/w_o": (("self_attn.o_proj.weight",), ((2, 0, 1), 1)),
    "ffn_norm/scale": (("post_attention_layernorm.weight",), _VECTOR),
    "ffn/gate_up": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), _MATRIX),
    "ffn/down": (("mlp.down_proj.weight",), _MATRIX),
    "moe/centroids": (("mlp.gate.weight",), _MATRIX),
    "moe/bias": (("mlp.gate.e_score_correction_bias",), _VECTOR),
    "moe/gate_up": (("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), _MATRIX),
    "moe/down": (("mlp.experts.{}.down_proj.weight",), _MATRIX),
    "moe/shared/gate_up": (
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        _MATRIX,
    ),
    "moe/shared/down": (("mlp.shared_experts.down_proj.weight",), _MATRIX),
}
_FUSED = {"moe/gate_up": "mlp.experts.gate_up_proj", "moe/down": "mlp.experts.down_proj"}
_TOP = {
    "embedding": ("model.embed_tokens.weight", ((0, 1), 1)),
    "head": ("lm_head.weight", _MATRIX),
    "final_norm/scale": ("model.norm.weight", _VECTOR),
}
_DEPTH = {
    "merge": ("eh_proj.weight", _MATRIX),
    "embedding_norm/scale": ("enorm.weight", _VECTOR),
    "hidden_norm/scale": ("hnorm.weight", _VECTOR),
    "norm/scale": ("shared_head.norm.weight", _VECTOR),
}
_MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


def has_bias(config: ModelConfig) -> bool:
    """Whether folders of this model have a router bias: the classes with sigmoid gates do."""
    return config.moe.n_dense_layers < config.n_layers and config.moe.gate == "sigmoid"


@functools.lru_cache(maxsize=64)
def leaves(config: ModelConfig) -> dict[Path, Leaf]:
    """Every array of the model, router state included, by path."""
    found = {}
    for path, shape in shapes(config).items():
        stack, inner = path[1], "/".join(path[2:])
        if stack.startswith("mtp_") and path[2] == "block":
            inner, lead = "/".join(path[3:]), 0
        else:
            lead = 1 if stack.endswith("_layers") else 0
        top = "/".join(path[1:])
        if top in _TOP:
            parts, (order, outputs) = 1, _TOP[top][1]
        elif inner in _DEPTH and stack.startswith("mtp_"):
            parts, (order, outputs) = 1, _DEPTH[inner][1]
        else:
            names, (order, outputs) = _BLOCK[inner]
            parts, lead = len(names), lead + ("{}" in names[0])
        found[path] = Leaf(path, shape, lead, order, outputs, parts)
    return found


RELEASED = Layout()


def tensors(config: ModelConfig, layout: Layout = RELEASED) -> dict[str, Tensor]:
    """Every tensor of a folder of this model, by name, in the order in which released folders have them."""
    by_path = leaves(config)
    found: dict[str, Tensor] = {}

    def add(name: str, leaf: Leaf, index: tuple[int, ...], part: int = 0, parts: int = 1) -> None:
        rows = leaf.block[0] // parts
        matrix = (leaf.matrix[0] // parts, leaf.matrix[1]) if len(leaf.block) > 1 else leaf.block
        found[name] = Tensor(matrix, leaf.path, index, part * rows, rows)

    embedding, norm = by_path["params", "embedding"], by_path["params", "final_norm", "scale"]
    add("model.embed_tokens.weight", embedding, ())
    dense = min(config.moe.n_dense_layers, config.n_layers)
    for layer in range(config.n_layers + config.mtp.depth):
        prefix = f"model.layers.{layer}."
        if layer < config.n_layers:
            stack = ("dense_layers",) if layer < dense else ("moe_layers",)
            index: tuple[int, ...] = (layer if layer < dense else layer - dense,)
        else:
            stack, index = (f"mtp_{layer - config.n_layers + 1}",), ()
            if layout.mtp_copies:
                _add_copies(found, prefix, by_path)
            for inner, (name, _) in _DEPTH.items():
                if leaf := by_path.get(("params", *stack, *inner.split("/"))):
                    add(prefix + name, leaf, index)
            stack = (*stack, "block")
        _add_block(add, found, config, layout, by_path, stack, index, prefix)
    add("model.norm.weight", norm, ())
    if not config.tie_embeddings:
        add("lm_head.weight", by_path["params", "head"], ())
    elif layout.tied_head:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]._replace(
            copy_of="model.embed_tokens.weight"
        )
    return found


def _add_copies(found: dict[str, Tensor], prefix: str, by_path: dict[Path, Leaf]) -> None:
    for name, original in _MTP_COPIES.items():
        path = ("params", "head")
        if path not in by_path or "embed" in name:
            path, original = ("params", "embedding"), "model.embed_tokens.weight"
        leaf = by_path[path]
        found[prefix + name] = Tensor(leaf.matrix, path, (), 0, leaf.block[0], original)


def _add_block(add, found, config, layout, by_path, stack, index, prefix) -> None:
    for inner, (names, _) in _BLOCK.items():
        collection = "router" if inner == "moe/bias" else "params"
        leaf = by_path.get((collection, *stack, *inner.split("/")))
        if inner == "moe/bias" and not has_bias(config):
            continue
        if leaf is None:
            if inner.startswith("moe/shared/") and (collection, *stack, "moe", "down") in by_path:
                _add_empty(found, config, prefix, names)
            continue
        if inner == "attention/w_uq_qr" and not config.attention.q_lora_rank:
            names = ("self_attn.q_proj.weight",)
        if inner in _FUSED and layout.fused:
            shape = (config.moe.n_experts, *leaf.matrix)
            found[prefix + _FUSED[inner]] = Tensor(shape, leaf.path, index, 0, shape[0])
            continue
        for expert in range(config.moe.n_experts) if "{}" in names[0] else [None]:
            where = index if expert is None else (*index, expert)
            for part, name in enumerate(names):
                add(prefix + name.format(expert), leaf, where, part, len(names))


def _add_empty(found, config, prefix, names) -> None:
    """Without shared experts the released code still has their matrices, of no width."""
    for name in names:
        shape = (config.d_model, 0) if "down" in name else (0, config.d_model)
        found[prefix + name] = Tensor(shape, (), (), 0, 0)


def scale_leaf(leaf: Leaf) -> Leaf:
    """The leaf of the block scales of a leaf in E4M3: matrices of the same parts, 128 times smaller."""
    rows, cols = scale_shape((leaf.matrix[0] // leaf.parts, leaf.matrix[1]))
    shape = (*leaf.shape[: leaf.lead], leaf.parts * rows, cols)
    return Leaf(("scales", *leaf.path[1:]), shape, leaf.lead, (0, 1), 1, leaf.parts)


def nested(flat: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """A tree from (path, value) pairs."""
    tree: dict[str, Any] = {}
    for path, value in flat:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree

"""Nested dicts and lists of arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

Tree = Any


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Applies `function` to the leaves of trees of one structure; a missing subtree (None) stays None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: tree_map(function, tree[name], *(other[name] for other in others)) for name in tree}
    if isinstance(tree, list):
        return [tree_map(function, *leaves) for leaves in zip(tree, *others, strict=True)]
    return function(tree, *others)


def float64(tree: Tree) -> Tree:
    """The tree with every leaf a float64 numpy array."""
    return tree_map(lambda leaf: np.asarray(leaf, np.float64), tree)

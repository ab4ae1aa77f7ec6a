"""Gradients without differentiation rules."""

from collections.abc import Callable

from tests.oracles.tree import Tree, float64, tree_map


def directional_derivative(
    function: Callable[[Tree], float], at: Tree, along: Tree, step: float = 1e-5
) -> float:
    """d/dt function(at + t * along) at t = 0 by central differences; compare it with <gradient, along>.

    With values and derivatives near 1 in float64 the truncation error is about step^2 = 1e-10 and the
    rounding error about 1e-16 / step = 1e-11. `function` must be smooth there: no
    token may sit at a routing boundary.
    """
    at, along = float64(at), float64(along)
    forward = function(tree_map(lambda x, v: x + step * v, at, along))
    backward = function(tree_map(lambda x, v: x - step * v, at, along))
    return (forward - backward) / (2 * step)

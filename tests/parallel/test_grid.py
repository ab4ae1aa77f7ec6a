"""Training steps on meshes of 8 devices, by ZeRO mode, accumulation, precision and load, against one device.

    DSV3_GRID=all pytest -rP tests/parallel/test_grid.py     # All 84 programs, some 20 minutes of a core.

By itself two like them, of fewer tokens than experts: with the three of `training/test_step.py`, of more and
beside float64 numpy, they have every mesh and every mode, with and without accumulation, the finest and the
coarsest precision.
"""

import os

import numpy as np
import pytest

from tests.parallel.grid import FEW, HOT, LOADS, Case, every, gradients, moves, parameters, start, step

CHOSEN = [Case(4, 2, "fsdp", size=FEW), Case(1, 8, "zero1", precision="fp8", size=FEW)]
CASES = every() if os.environ.get("DSV3_GRID") == "all" else CHOSEN

# Unit roundoffs: of a float32 sum, of bf16, of e4m3.
FP32, BF16, E4M3 = 2.0**-24, 2.0**-8, 2.0**-4
# A gradient has gone through about ten products in a row, each rounded; in FP8 most are of operands that are
# equal on both sides, and weights' gradients are rounded twice. In the whole grid: 0.032, 0.074.
SAME = {"bf16": 10 * BF16, "fp8": 2 * E4M3}


def norm(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in tree.values()))


def apart(a, b):
    return {name: a[name] - leaf for name, leaf in b.items()}


def relative(a, b):
    """By leaf, in norms."""
    return {name: np.linalg.norm(a[name] - leaf) / np.linalg.norm(leaf) for name, leaf in b.items()}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_one_device(case, load):
    one, exact = Case(precision=case.precision, size=case.size), Case(size=case.size)
    (state, metrics), (wanted, expected) = step(case)[load], step(one)[load]
    np.testing.assert_array_equal(metrics.counts, expected.counts)
    # Choices are the same in float32, so the distance to its gradients is of roundings alone.
    np.testing.assert_array_equal(metrics.counts, step(exact)[load][1].counts)
    tokens = case.size.batch * case.size.seq
    assert metrics.counts.sum() == tokens * case.size.model.moe.top_k
    assert load == "spread" or metrics.counts[:, HOT] == tokens
    bias, theirs = (x.router["moe_layers"]["moe"]["bias"] for x in (state, wanted))
    np.testing.assert_array_equal(bias, theirs)
    assert (bias != start(case.size, load).router["moe_layers"]["moe"]["bias"]).any()
    losses, norms = ((a / b - 1) for a, b in zip(scalars(metrics), scalars(expected), strict=True))
    print(f"{case}, {load}: loss {losses:.1e}, norm {norms:.1e}", end="")
    check = as_float32 if case.precision == "fp32" else as_rounded
    check(case, one, exact, load)
    # Losses are means: of roundings of either sign.
    limit = 1e-6 if case.precision == "fp32" else SAME[case.precision] / 8
    assert abs(losses) < limit and abs(norms) < limit


def scalars(metrics):
    return float(metrics.losses.loss), float(metrics.grad_norm)


def as_float32(case, one, exact, load):
    """Sums over devices in another order, of some hundred terms."""
    off = relative(gradients(case, load), gradients(one, load))
    wanted, moved = parameters(one, load), moves(one, load)
    moved_off = apart(parameters(case, load), wanted)
    largest = max(np.linalg.norm(moved_off[name]) / np.linalg.norm(wanted[name]) for name in wanted)
    print(f", gradients {max(off.values()):.1e}, parameters {largest:.1e}")
    assert max(off.values()) < 1e-6, off
    for name, difference in moved_off.items():
        # A parameter of 1 that moves by 0.01 is rounded itself, half a unit on either side.
        room = 1e-6 * np.linalg.norm(moved[name]) + 2 * FP32 * np.linalg.norm(wanted[name])
        assert 0 < np.linalg.norm(moved[name]) and np.linalg.norm(difference) <= room, name


def as_rounded(case, one, exact, load):
    """As near to one device as roundings are large, no further than it from what float32 finds."""
    for of in (gradients, moves):
        ours, theirs, truth = of(case, load), of(one, load), of(exact, load)
        off = relative(ours, theirs)
        ratio = norm(apart(ours, truth)) / norm(apart(theirs, truth))
        print(f", {of.__name__} {max(off.values()):.1e}, from float32 {ratio:.2f} x one device", end="")
        assert max(off.values()) < SAME[case.precision], (of.__name__, off)
        assert ratio < 1.1, of.__name__
    print()

"""Expert parallelism: tokens over 8 devices and back, against the same products on one device."""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.model import experts
from dsv3_jax.parallel.mesh import make_mesh, use_mesh

BATCH, SEQ, TOP_K, EXPERTS, D, F = 8, 6, 3, 16, 8, 4


def tensors(d=D, f=F):
    rng = np.random.default_rng(4)
    shapes = {
        "u": (BATCH, SEQ, d),
        "gates": (BATCH, SEQ, TOP_K),
        "gate_up": (EXPERTS, d, 2 * f),
        "down": (EXPERTS, f, d),
        "dy": (BATCH, SEQ, d),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def spread():
    rng = np.random.default_rng(0)
    picks = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(BATCH * SEQ)]
    return np.array(picks, np.int32).reshape(BATCH, SEQ, TOP_K)


LOADS = {
    "spread": spread(),
    # All that rank 0 has room for, many times over.
    "one expert takes everything": np.tile(np.array([0, 1, 2], np.int32), (BATCH, SEQ, 1)),
    "a rank for each choice": np.tile(np.array([15, 0, 7], np.int32), (BATCH, SEQ, 1)),
}
NAMES = ("out", "du", "dgates", "dgate_up", "ddown")


@functools.cache
def compiled(data, expert, transport="auto", slack=1.25, recipe=None, dtype="float32"):
    """(u, gates, gate_up, down, indices, dy) -> the sum of the experts, and its gradients."""
    config = MeshConfig(data=data, expert=expert, transport=transport, dispatch_slack=slack)
    mesh = make_mesh(config)

    def run(u, gates, gate_up, down, indices, dy):
        def forward(u, gates, gate_up, down):
            return experts.routed_experts(u.astype(dtype), indices, gates, gate_up, down, "auto", recipe)

        with use_mesh(mesh, config):
            out, back = jax.vjp(forward, u, gates, gate_up, down)
            return out, *back(dy.astype(dtype))

    return jax.jit(run)


def results(load, *mesh, d=D, f=F, **options):
    t = tensors(d, f)
    found = compiled(*mesh, **options)(*(t[k] for k in ("u", "gates", "gate_up", "down")), load, t["dy"])
    return [np.asarray(x, np.float32) for x in found]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("data", "expert", "transport", "slack"),
    [(1, 8, "dense", 1.25), (2, 4, "gather", 0.5), (4, 2, "dense", 9.0)],
)
def test_values_and_gradients_equal_one_device(load, data, expert, transport, slack):
    """Slack 0.5 needs further rounds even of a balanced load; 9 has room for any load, in one."""
    ours = results(LOADS[load], data, expert, transport=transport, slack=slack)
    for name, a, b in zip(NAMES, ours, results(LOADS[load], 1, 1), strict=True):
        # The order of some float32 sums: over a token's experts, and over an expert's tokens.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=name)

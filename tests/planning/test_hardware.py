"""Topologies as text, and what is wrong with them."""

import pytest

from dsv3_jax.planning import PlanError, parse_topology


@pytest.mark.parametrize(
    "text, n_devices, node",
    [
        ("v5p:16x16x16", 4096, 4096),
        ("v6e:16x16", 256, 256),
        ("h200:2", 2, 2),
        ("h100:256x8", 2048, 8),
        ("H800:256x8", 2048, 8),
    ],
)
def test_sizes(text, n_devices, node):
    topology = parse_topology(text)
    assert (topology.n_devices, topology.node) == (n_devices, node)


@pytest.mark.parametrize(
    "text, fix",
    [
        ("v9:4x4", "no chip 'v9'; choose one of v5e, v5p"),
        ("v5p:4x4", "v5p slices have 3 sides, as v5p:4x4x4"),
        ("v6e:2x2x2", "v6e slices have 2 sides"),
        ("h100:4x4x4", "NODESxGPUS"),
        ("h100", "expected CHIP:SHAPE"),
        ("h100:0x8", "expected CHIP:SHAPE"),
        ("h100:8x", "expected CHIP:SHAPE"),
    ],
)
def test_bad_topologies_name_the_fix(text, fix):
    with pytest.raises(PlanError, match=fix):
        parse_topology(text)

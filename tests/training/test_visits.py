"""State in host memory that visits the device, against numpy: every part, once, in order."""

import jax
import numpy as np
import pytest

from dsv3_jax.training import visits


@pytest.mark.parametrize("count", [1, 2, 6])
def test_every_part_is_updated_once_with_the_parts_that_came_with_it(count):
    rng = np.random.default_rng(count)
    lead, trail, kept = ({"a": rng.integers(0, 9, (6, 2)), "b": rng.integers(0, 9, (12,))} for _ in range(3))

    def on_lead(i, kept, here):
        return jax.tree.map(lambda x, y: x * 3 + y + i, here, visits.part(kept, i, count))

    def on_trail(i, kept, old, here):
        # `old` is what lead's part was before.
        mixed = jax.tree.map(lambda x, y, z: x + 5 * y + z, old, here, visits.part(kept, i, count))
        return mixed, visits.with_part(kept, jax.tree.map(lambda x: x + i, mixed), i)

    @jax.jit
    def update(lead, trail, kept):
        lead, trail = visits.to_host((lead, trail))
        return visits.in_turns(count, lead, trail, kept, on_lead, on_trail)

    found = update(lead, trail, kept)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found[:2])} == {"pinned_host"}
    for name in lead:
        rows = len(lead[name])
        i = (np.arange(rows) * count // rows).reshape(rows, *[1] * (lead[name].ndim - 1))
        mixed = lead[name] + 5 * trail[name] + kept[name]
        expected = lead[name] * 3 + kept[name] + i, mixed, mixed + i
        for ours, exact in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours[name], exact)

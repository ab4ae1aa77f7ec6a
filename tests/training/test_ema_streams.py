"""What a step asks of XLA for the average that it updates: lowered for GPUs, by a JAX that can."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.training import ema, ema_beside


@pytest.mark.skipif(ema_beside._call is None, reason="calls on streams of their own need JAX 0.11")
@pytest.mark.parametrize(("devices", "expected"), [(1, ["4", "5", "6", "7"]), (2, ["4", "5"])])
def test_on_gpus_every_piece_is_a_call_that_starts_early_on_one_of_few_streams(
    monkeypatch, devices, expected
):
    monkeypatch.setattr(ema_beside, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(ema_beside, "has_streams", lambda mesh: True)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    place = NamedSharding(mesh, P())
    params = {f"p{i}": jax.ShapeDtypeStruct((8, 512 << i), np.float32, sharding=place) for i in range(6)}
    layout = ema.shardings({name: place for name in params}, "host")
    average = ema_beside.abstract_average(params, layout)
    update = ema_beside.make_update(0.9, params, place, lanes=ema_beside.lane_count(mesh))
    finite = jax.ShapeDtypeStruct((), bool, sharding=place)
    traced = jax.jit(update, donate_argnums=0).trace(average, params, finite, finite)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"mhlo.frontend_attributes = \{(.*?)\}", text)
    streams = [m.group(1) for call in calls if (m := re.search(r'_xla_stream_annotation = "(\d+)"', call))]
    assert len(streams) == len(jax.tree.leaves(average)) > len(params)
    # XLA has small sums over devices on the first four, by turns: there they would wait for a lane.
    assert sorted(set(streams)) == expected
    early = 'scheduler_hint = "force_delay"'
    assert all(early in call for call in calls if "_xla_stream_annotation" in call)

"""Mesh shapes, and how arrays are laid out over the axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh_checks import mesh_shape
from dsv3_jax.parallel import mesh as meshes
from pallas_kernels import implementations


@pytest.mark.parametrize(
    ("pipe", "data", "expert", "devices", "expected"),
    [
        (1, -1, 1, 8, (1, 8, 1)),
        (1, -1, 4, 8, (1, 2, 4)),
        (1, 2, -1, 8, (1, 2, 4)),
        (-1, 2, 1, 8, (4, 2, 1)),
        (2, -1, 2, 8, (2, 2, 2)),
        (1, 1, 1, 8, (1, 1, 1)),
        (1, 2, 2, 4, (1, 2, 2)),
    ],
)
def test_shapes(pipe, data, expert, devices, expected):
    assert mesh_shape(MeshConfig(pipe=pipe, data=data, expert=expert), devices) == expected


@pytest.mark.parametrize(("data", "expert"), [(16, 1), (4, 4), (-1, 16)])
def test_a_mesh_larger_than_the_devices_is_refused(data, expert):
    with pytest.raises(ValueError, match=f"data={data} x expert={expert} does not fit 8 devices"):
        meshes.make_mesh(MeshConfig(data=data, expert=expert))
    with pytest.raises(ValueError, match="pipe=-1 x data=1 x expert=-1: only one axis may be -1"):
        meshes.make_mesh(MeshConfig(pipe=-1, data=1, expert=-1))


def test_first_devices_in_order():
    mesh = meshes.make_mesh(MeshConfig(pipe=2, data=2, expert=2))
    assert mesh.axis_names == meshes.AXES == ("pipe", "data", "expert")
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert [d.id for d in mesh.devices[1, 0]] == [4, 5]  # `expert` has neighbours.
    assert [d.id for d in meshes.make_mesh(MeshConfig(data=2, expert=1)).devices.flat] == [0, 1]


@pytest.mark.parametrize(
    ("names", "shape", "over_data", "expected"),
    [
        (("layers", "experts", "embed", "mlp"), (8, 4, 16, 32), False, (None, ("expert",), None, None)),
        (("layers", "experts", "embed", "mlp"), (8, 4, 16, 32), True, (None, ("expert",), ("data",), None)),
        (("layers", "experts", "embed", "mlp"), (8, 8, 16, 32), True, (None, ("expert", "data"), None, None)),
        (("embed", "heads", "head"), (24, 3, 7), True, (("data", "expert"), None, None)),  # By 8.
        (("embed", "heads", "head"), (12, 3, 7), True, (("data",), None, None)),  # 8 divides none.
        (("layers", "norm"), (8, 7), True, (None, None)),  # Never layers; and 2 does not divide 7.
        ((None, "norm"), (6, 4), True, (("data",), None)),  # The outer one.
    ],
)
def test_layout_of_parameters(names, shape, over_data, expected):
    mesh = meshes.make_mesh(MeshConfig(data=2, expert=4))
    assert meshes.state_spec(names, shape, mesh, over_data) == PartitionSpec(*expected)


@pytest.mark.parametrize(("layers", "over"), [(4, ("pipe",)), (3, None)])
def test_layers_over_pipe_where_it_divides(layers, over):
    mesh = meshes.make_mesh(MeshConfig(pipe=2, data=2, expert=2))
    table = {**meshes.LOGICAL_AXES, "layers": ("pipe",)}
    found = meshes.state_spec(("layers", "experts", "embed"), (layers, 4, 6), mesh, True, table)
    assert found == PartitionSpec(over, ("expert", "data"), None)


def test_activations_are_split_over_both_axes():
    mesh = meshes.make_mesh(MeshConfig(data=2, expert=4))
    x = jnp.arange(16.0).reshape(8, 2)
    assert meshes.constrain(x, "batch", None) is x and meshes.current_mesh() is None  # No mesh: no change.
    with meshes.use_mesh(mesh):
        assert meshes.current_mesh() is mesh
        split = jax.jit(lambda x: meshes.constrain(x * 1, "batch", None))(x)
    assert meshes.current_mesh() is None
    rows = {s.device.id: np.asarray(s.data) for s in split.addressable_shards}
    for device in range(8):
        np.testing.assert_array_equal(rows[device], x[device : device + 1])
    with meshes.use_mesh(meshes.make_mesh(MeshConfig(data=1, expert=1))):
        assert meshes.current_mesh() is None  # One device needs no layout.


@pytest.mark.parametrize("devices, alone", [(1, True), (2, False)])
def test_kernels_run_on_a_mesh_of_one_of_several_devices(devices, alone):
    config, found = MeshConfig(data=devices), []

    @jax.jit
    def program(x):
        with meshes.use_mesh(meshes.make_mesh(config)):
            found.append(implementations.on_one_device())
            return x + 1

    x = jax.device_put(jnp.zeros(8), jax.devices()[3])
    assert program(x).devices() == x.devices() and found == [alone]


def test_eight_devices_are_here():
    """Without them every test of a mesh would fail or, worse, test one device."""
    assert jax.device_count() == 8 and jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("slices", "processes", "expert", "expected"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3], 8, 4),  # An NVLink domain of two processes.
        ([None] * 8, [0, 0, 1, 1, 2, 2, 3, 3], 8, 2),
        ([None] * 8, [0] * 8, 8, 8),
        ([None] * 8, [0, 0, 0, 1, 1, 1, 1, 1], 8, 1),  # Of different sizes: straight to each rank.
        ([None] * 8, [0, 0, 0, 0, 1, 1, 1, 1], 4, 4),
    ],
)
def test_the_nodes_that_experts_span(slices, processes, expert, expected):
    @dataclasses.dataclass
    class Device:
        slice_index: int | None
        process_index: int

    devices = np.array([Device(*which) for which in zip(slices, processes, strict=True)], object)
    assert meshes._node(devices.reshape(1, -1, expert)) == expected

"""The shape of the device mesh: what the configured axes come to, whether that fits, and what would."""

import math
from typing import Any, NamedTuple

from dsv3_jax.config import Config, MeshConfig

Problem = tuple[str, Any, str]  # Field, value, fix: see `config_reading.Problem`.
PROPOSALS = 3


class MeshShape(NamedTuple):
    """Devices along each axis of the mesh."""

    pipe: int
    data: int
    expert: int


def mesh_shape(mesh: MeshConfig, n_devices: int) -> MeshShape:
    """The sizes of the axes on `n_devices`, -1 resolved to the devices that the others leave.

    Raises:
      ValueError: more than one axis is -1, or the axes do not multiply to a number of devices that exists.
    """
    asked = _asked(mesh)
    if list(asked).count(-1) > 1:
        raise ValueError(f"a mesh of {_named(asked)}: only one axis may be -1")
    known = math.prod(size for size in asked if size != -1)
    shape = MeshShape(*(n_devices // known if size == -1 else size for size in asked))
    if not 1 <= math.prod(shape) <= n_devices:
        raise ValueError(f"a mesh of {_named(asked)} does not fit {n_devices} devices")
    return shape


def problems(config: Config, n_devices: int) -> list[Problem]:
    """What of the mesh does not fit `n_devices`, batch, experts or layers, as (field, value, fix).

    Every fix proposes the nearest meshes that do fit.
    """
    asked = _asked(config.mesh)
    found: list[Problem] = [
        (f"mesh.{name}", size, "must be at least 1, or -1 for the rest of the devices")
        for name, size in zip(MeshShape._fields, asked, strict=True)
        if size != -1 and size < 1
    ]
    rest = [name for name, size in zip(MeshShape._fields, asked, strict=True) if size == -1]
    if len(rest) > 1:
        found.append((f"mesh.{rest[-1]}", -1, "only one axis may be -1; give this one a size"))
    if found:
        return found

    known = math.prod(size for size in asked if size != -1)
    if known > n_devices or (rest and n_devices % known):
        largest = max((size, name) for name, size in zip(MeshShape._fields, asked, strict=True))[1]
        near = _nearest(config, asked, n_devices)
        return [(f"mesh.{largest}", max(asked), f"{_named(asked)} does not fit {n_devices} devices; {near}")]
    shape = mesh_shape(config.mesh, n_devices)
    near = _nearest(config, shape, n_devices)
    if _micro(config) % (shape.data * shape.expert):
        field = "micro_batch_size" if config.train.micro_batch_size else "batch_size"
        over = f"data x expert = {shape.data} x {shape.expert}"
        fix = f"a micro-batch of {_micro(config)} sequences must divide over {over}; {near}"
        found.append((f"train.{field}", _micro(config), fix))
    if _experts(config) % shape.expert:
        fix = f"must divide model.moe.n_experts = {_experts(config)}; {near}"
        found.append(("mesh.expert", config.mesh.expert, fix))
    node = config.mesh.expert_node
    if node < 0 or (node and shape.expert % node):
        fix = f"must divide mesh.expert = {shape.expert}; 0: the nodes that the devices name"
        found.append(("mesh.expert_node", node, fix))
    if shape.pipe > config.model.n_layers:
        fix = f"at most model.n_layers = {config.model.n_layers}; {near}"
        found.append(("mesh.pipe", config.mesh.pipe, fix))
    return found


def _asked(mesh: MeshConfig) -> MeshShape:
    return MeshShape(mesh.pipe, mesh.data, mesh.expert)


def _named(shape: MeshShape) -> str:
    """As written on the command line; `pipe` is named only where it is used."""
    used = shape._asdict() if shape.pipe != 1 else {"data": shape.data, "expert": shape.expert}
    return " x ".join(f"{name}={size}" for name, size in used.items())


def _micro(config: Config) -> int:
    return config.train.micro_batch_size or config.train.batch_size


def _experts(config: Config) -> int:
    """The number of experts that `expert` must divide; 0 for a dense model, which any number divides."""
    moe = config.model.moe
    return moe.n_experts if moe.n_dense_layers < config.model.n_layers else 0


def _nearest(config: Config, asked: MeshShape, n_devices: int) -> str:
    """The meshes that fit and lie nearest to the one asked for, by the ratios of their axes."""
    micro, experts = max(1, _micro(config)), _experts(config)
    known = math.prod(size for size in asked if size != -1)
    wanted = [max(1.0, n_devices / known) if size == -1 else size for size in asked]
    fits = [
        MeshShape(pipe, data, expert)
        for expert in _divisors(math.gcd(micro, experts), n_devices)
        for data in _divisors(micro // expert, n_devices // expert)
        for pipe in range(1, min(config.model.n_layers, n_devices // (data * expert)) + 1)
    ]

    def distance(shape: MeshShape) -> tuple[float, int]:
        off = sum(abs(math.log(size / want)) for size, want in zip(shape, wanted, strict=True))
        return round(off, 6), -math.prod(shape)  # Of equally near ones, the one that uses more devices.

    best = sorted(fits, key=distance)[:PROPOSALS]
    return "nearest that fit: " + ", or ".join(_named(shape).replace(" x ", " ") for shape in best)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]

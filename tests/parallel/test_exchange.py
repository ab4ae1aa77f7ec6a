"""Expert parallelism: tokens over 8 devices and back, against the same products on one device."""

import functools
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import FP8Config, MeshConfig, ModelConfig, MoEConfig
from dsv3_jax.model import experts
from dsv3_jax.model.moe import MoE
from dsv3_jax.parallel import exchange, transport
from dsv3_jax.parallel.mesh import current_mesh, make_mesh, use_mesh
from pallas_kernels import target_platform

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
def compiled(data, expert, transport="auto", slack=1.25, node=0, recipe=None, dtype="float32"):
    """(u, gates, gate_up, down, indices, dy) -> the sum of the experts, and its gradients."""
    options = dict(transport=transport, dispatch_slack=slack, expert_node=node)
    config = MeshConfig(data=data, expert=expert, **options)
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
    ("data", "expert", "node", "transport", "slack"),
    [
        (1, 8, 1, "dense", 1.25),
        (2, 4, 2, "gather", 0.5),
        (4, 2, 0, "dense", 9.0),
        (1, 8, 4, "dense", 0.4),
        (1, 8, 2, "dense", 9.0),
    ],
)
def test_values_and_gradients_equal_one_device(load, data, expert, node, transport, slack):
    """Slack 0.5 needs further rounds even of a balanced load; 9 has room for any load, in one."""
    ours = results(LOADS[load], data, expert, node=node, transport=transport, slack=slack)
    for name, a, b in zip(NAMES, ours, results(LOADS[load], 1, 1), strict=True):
        # The order of some float32 sums: over a token's experts, and over an expert's tokens.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(("recipe", "tolerance"), [(None, 4e-3), (FP8Config(), 6e-2)])
def test_other_precisions(recipe, tolerance):
    """A rank's sums travel in bf16, 2^-9 a rounding. In FP8 a round's tokens share tiles with others than on
    one device, which rounds the weights' gradients anew, by 0.026 an operand."""
    for load in LOADS.values():
        options = dict(recipe=recipe, dtype="bfloat16")
        for name, a, b in zip(
            NAMES, results(load, 1, 8, **options), results(load, 1, 1, **options), strict=True
        ):
            off = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert off < (tolerance if name in ("dgate_up", "ddown") else 6e-3), (name, off)


def test_in_a_region_that_is_manual_already():
    """As a pipeline calls it: arrays are a device's own, weights its part of the experts."""
    t, load = tensors(), LOADS["spread"]
    config = MeshConfig(data=2, expert=4)
    mesh, batch = make_mesh(config), P(("data", "expert"))

    def on_device(u, gates, gate_up, down, indices):
        with use_mesh(mesh, config, manual=True):
            assert current_mesh() is None and gate_up.shape[0] == EXPERTS // 4
            return experts.routed_experts(u, indices, gates, gate_up, down, "auto")

    specs = (batch, batch, P("expert"), P("expert"), batch)
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    out = jax.jit(mapped)(t["u"], t["gates"], t["gate_up"], t["down"], load)
    np.testing.assert_allclose(out, results(load, 1, 1)[0], rtol=1e-6, atol=1e-5)  # As above.


RANKS, TOKENS = 4, 12


@functools.cache
def routes(slack, node):
    """(indices, round, x, y) -> rounds, their number, the tokens that the first hop sends, those that arrived
    (-1: an empty slot), rows of each expert, and (<spread(x), y>, <x, collect(y)>)."""
    wire = transport.Wire("expert", RANKS, "dense", slack, node)
    room = exchange.capacity(TOKENS, TOP_K, EXPERTS, wire)

    def on_rank(indices, number, x, y):
        when = exchange.rounds(indices, EXPERTS, wire, room)
        to = exchange.exchange(indices, EXPERTS, wire, room, when, number)
        rows = to.spread(x)
        # What the products give: zero past the last group.
        y = jnp.where(jnp.arange(len(rows))[:, None] < to.group_sizes.sum(), y[: len(rows)], 0)
        forward, back = jnp.vdot(rows, y), jnp.vdot(x, to.collect(y))
        sums = jax.lax.psum(jnp.stack([forward, back]), "expert")
        last = to.hops[-1]
        used = jnp.arange(last.token.shape[1]) < last.received[:, None]
        first = to.hops[0].token[None]
        arrived = jnp.where(used.reshape(-1), to.send(x)[:, 0], -1)
        return when.number, when.needed[None], first, arrived[None], to.group_sizes, sums[None]

    mesh = make_mesh(MeshConfig(data=1, expert=RANKS))
    each, everywhere = P("expert"), P()
    specs = dict(in_specs=(each, everywhere, each, each), out_specs=each)
    return room, jax.jit(jax.shard_map(on_rank, mesh=mesh, check_vma=False, **specs))


@pytest.mark.parametrize(("slack", "node"), [(0.3, 1), (1.25, 1), (0.3, 2), (1.25, 2)])
@pytest.mark.parametrize("hot", [0.0, 0.9, 1.0])
def test_every_token_travels_once_to_each_node_and_rank_of_its_experts(slack, node, hot):
    rng = np.random.default_rng(int(10 * hot))
    weights = np.where(np.arange(EXPERTS) < TOP_K, hot, 1 - hot) + 1e-9
    picks = [rng.choice(EXPERTS, TOP_K, False, weights / weights.sum()) for _ in range(RANKS * TOKENS)]
    indices = np.array(picks, np.int32)
    # Small integers: sums are exact. A token is its own number in the first column.
    x, y = (rng.integers(-4, 5, (RANKS * n, 4)).astype(np.float32) for n in (TOKENS, 12 * TOKENS * TOP_K))
    x[:, 0] = np.arange(RANKS * TOKENS)
    room, run = routes(slack, node)
    travelled, arrivals, copies, number, count = [], [], 0, 0, 1
    while number < count:
        when, counts, token, arrived, sizes, (sums, *_) = jax.device_get(run(indices, number, x, y))
        count = counts[0]
        assert (counts == count).all() and count <= room.rounds
        assert sums[0] == sums[1]  # Each is the other's transpose.
        for source, to, slot in np.argwhere(token < TOKENS):
            mine = source * TOKENS + token[source, to, slot]
            assert when[mine, to] == number
            travelled.append((int(mine), int(to)))
        arrivals += [(int(arrived[to, slot]), int(to)) for to, slot in np.argwhere(arrived >= 0)]
        copies, number = copies + sizes, number + 1
    wanted = {(token, int(rank)) for token, row in enumerate(indices // (EXPERTS // RANKS)) for rank in row}
    assert len(arrivals) == len(set(arrivals)) and set(arrivals) == wanted
    nodes = {(token, rank // node) for token, rank in wanted}
    assert len(travelled) == len(set(travelled)) and set(travelled) == nodes
    np.testing.assert_array_equal(copies, np.bincount(indices.reshape(-1), minlength=EXPERTS))
    pairs = np.zeros((RANKS, RANKS // node), int)  # Tokens from rank to node; a round has room for so many.
    np.add.at(pairs, tuple(np.array([(token // TOKENS, to) for token, to in nodes]).T), 1)
    assert count >= -(-pairs.max() // room.slots) and (hot < 1 or count > 1)


def there_and_back(name):
    """(indices, x) -> what arrives by two hops, zero in slots that are not in use, and its sums at home."""
    wire = transport.Wire("expert", RANKS, name, 9.0, node=2)
    room = exchange.capacity(TOKENS, TOP_K, EXPERTS, wire)

    def on_rank(indices, x):
        when = exchange.rounds(indices, EXPERTS, wire, room)
        to = exchange.exchange(indices, EXPERTS, wire, room, when, 0)
        arrived, last = to.send(x), to.hops[-1]
        used = (jnp.arange(last.token.shape[1]) < last.received[:, None]).reshape(-1, 1)
        return jnp.where(used, arrived, 0), to.home(arrived), to.group_sizes

    mesh, each = make_mesh(MeshConfig(data=1, expert=RANKS)), P("expert")
    return jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))


def test_a_remote_copy_moves_what_a_dense_exchange_does():
    """The kernel for TPU, interpreted: to the bit, on loads that leave ranks and slots empty."""
    x = np.random.default_rng(1).standard_normal((RANKS * TOKENS, 4)).astype(np.float32)
    loads = {name: load.reshape(-1, TOP_K) for name, load in LOADS.items()}
    with target_platform("tpu"), pltpu.force_tpu_interpret_mode():
        remote = there_and_back("remote")
        ours = {name: jax.device_get(remote(load, x)) for name, load in loads.items()}
    dense = there_and_back("dense")
    for name, load in loads.items():
        for a, b in zip(ours[name], dense(load, x), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_who_exchanges_with_whom():
    """Between nodes the ranks with the same place; within a node all; one hop where there is one node."""
    wire = transport.Wire("expert", 8, "dense", 1.0, node=4)
    between, within = wire.hops
    assert between.peers == [[0, 4], [1, 5], [2, 6], [3, 7]] and between.ranks == 2
    assert within.peers == [[0, 1, 2, 3], [4, 5, 6, 7]] and within.ranks == 4
    for node in (0, 1, 8):
        (only,) = transport.Wire("expert", 8, "dense", 1.0, node=node).hops
        assert only.peers is None and only.ranks == 8


@pytest.mark.parametrize(
    ("n_experts", "ranks", "groups", "top_k"),
    [(16, 8, (1, 1), 3), (16, 4, (4, 2), 4), (32, 2, (8, 4), 6), (32, 16, (4, 2), 3)],
)
def test_a_balanced_load_fits_in_one_round(n_experts, ranks, groups, top_k):
    """The slots expected are those of experts drawn evenly from groups drawn evenly."""
    rng, draws = np.random.default_rng(0), 4000
    size, here = n_experts // groups[0], n_experts // ranks
    hit = np.zeros((draws, ranks), bool)
    for i in range(draws):
        chosen = rng.permutation(groups[0])[: groups[1]]
        members = (chosen[:, None] * size + np.arange(size)).reshape(-1)
        hit[i, rng.permutation(members)[:top_k] // here] = True
    wire = transport.Wire("expert", ranks, "dense", 1.0)
    room = exchange.capacity(10**6, top_k, n_experts, wire, groups)
    # The mean of 4000 draws of 0 or 1, over ranks that are alike: five deviations.
    assert room.slots / 1e6 == pytest.approx(hit.mean(), abs=5 * 0.5 / np.sqrt(draws))
    assert room.copies == 10**6 * top_k // ranks
    most = exchange.capacity(10**6, top_k, n_experts, transport.Wire("expert", ranks, "dense", 99.0), groups)
    assert most[:3] == (10**6, 10**6 * min(top_k, here), 1)  # Never more than there can be.


@pytest.mark.parametrize("slots", [5, 600])
def test_updates_of_a_ragged_exchange(slots):
    """What XLA documents of its operation, in numpy: it moves the slots in use as a dense exchange does."""
    rng = np.random.default_rng(2)
    counts = rng.integers(0, slots + 1, (3, 3))  # [from, to]
    buffers = rng.integers(1, 99, (3, 3, slots))
    moved = np.zeros_like(buffers)
    for source in range(3):
        parts = transport.updates(slots, jnp.int32(source), jnp.asarray(counts[source], jnp.int32))
        mine, theirs, sizes = (np.asarray(part).reshape(3, -1) for part in parts)
        assert sizes.shape[1] <= transport.UPDATES
        for to in range(3):
            received = transport.updates(slots, jnp.int32(to), jnp.asarray(counts[:, to], jnp.int32))[2]
            np.testing.assert_array_equal(np.asarray(received).reshape(3, -1)[source], sizes[to])
            flat, out = buffers[source].reshape(-1), moved[to].reshape(-1)
            for start, at, size in zip(mine[to], theirs[to], sizes[to], strict=True):
                out[at : at + size] = flat[start : start + size]
    used = np.arange(slots) < counts.T[:, :, None]
    np.testing.assert_array_equal(moved, np.where(used, buffers.transpose(1, 0, 2), 0))


def test_the_transport_of_each_platform():
    assert [transport.choose("auto", where) for where in ("cpu", "gpu", "tpu")] == [
        "dense",
        "dense",
        "ragged",
    ]
    assert transport.choose("gather", "tpu") == "gather"
    with pytest.raises(ValueError, match="mesh.transport = 'remote': take 'dense'"):
        results(LOADS["spread"], 1, 8, transport="remote")


@pytest.mark.parametrize(
    ("name", "platform", "places", "fix"),
    [
        ("ragged", "cpu", (0, 0), "does not exist on CPUs; take 'dense' or 'gather'"),
        ("remote", "cpu", (0, 0), "does not exist on CPUs; take 'dense' or 'gather'"),
        ("remote", "gpu", (0, 1), "copies between the GPUs of one process; take 'dense'"),
        ("remote", "tpu", (0, 1), "copies between the chips of one slice; take 'ragged'"),
        ("remote", "gpu", (0, 0), None),
        ("remote", "tpu", (0, 0), None),
        ("ragged", "gpu", (0, 1), None),
        ("dense", "cpu", (0, 1), None),
    ],
)
def test_transports_that_the_devices_lack(name, platform, places, fix):
    kind = types.SimpleNamespace
    devices = [kind(platform=platform, process_index=place, slice_index=place) for place in places]
    assert transport.problems(name, devices) == ([("mesh.transport", name, fix)] if fix else [])


def test_nothing_orders_the_shared_experts_after_the_exchange():
    """They read nothing that the routed experts made: the compiler may run them while tokens travel."""
    config = MeshConfig(data=1, expert=8)
    moe = MoE(ModelConfig(d_model=D, moe=MoEConfig(n_experts=EXPERTS, d_ff_expert=F)))
    u = jnp.zeros((BATCH, SEQ, D))
    variables = jax.eval_shape(moe.init, jax.random.key(0), u)

    def forward(variables, u):
        with use_mesh(make_mesh(config), config):
            return moe.apply(variables, u)

    made, shared = set(), 0  # By the exchange, directly or not.
    for equation in jax.make_jaxpr(forward)(variables, u).eqns:
        after = any(not isinstance(v, jax.extend.core.Literal) and v in made for v in equation.invars)
        products = equation.primitive.name == "dot_general"
        if "shared_experts" in str(equation.source_info.name_stack) and products:
            assert not after
            shared += 1
        if after or "shard_map" in equation.primitive.name:
            made |= set(equation.outvars)
    assert shared == 2 and made

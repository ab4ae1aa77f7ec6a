"""Tokens to the devices that hold their experts and back, dropless: a route over one mesh axis.

    token --(once for each rank that holds some of its experts)--> rank --> a row for each of those experts
    sum over those rows, on the rank, in float32 --(once)--> sum over the ranks

Where the ranks are spread over nodes, the first arrow is two hops (DeepSeek-V3 §3.2.2): once to each node, to
the rank that has the same place there, and from it once to each rank of the node. Sums return the same way.

Shapes are static, so a buffer has room for a number of rows set beforehand (`capacity`), and what does
not fit goes in further rounds of the same exchange: no token is ever dropped, and when one expert takes
everything it only takes more rounds. A route is for one round.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_jax.parallel.dispatch import take
from dsv3_jax.parallel.transport import IN_USE, Wire, move


class Capacity(NamedTuple):
    """What one rank sends in one round, at most."""

    slots: int  # Tokens to another rank; of two hops, to another node.
    copies: int  # (Token, expert) pairs to another rank.
    rounds: int  # That any routing may need; 1: everything fits, always.
    within: int = 0  # Of two hops: of its tokens, those that any node's rank gets by the second.


def capacity(
    tokens: int, top_k: int, n_experts: int, wire: Wire, groups: tuple[int, int] = (1, 1)
) -> Capacity:
    """Room for `slack` times the tokens and copies of a balanced load, at most for all there can be.

    Of a balanced load a rank gets `tokens * top_k / ranks` copies from each other, and those tokens of which
    at least one expert is there, when the experts are drawn evenly from the groups that are.

    Args:
      tokens: that a rank has.
      top_k: experts of a token.
      n_experts: over all ranks.
      wire: ranks, nodes and slack.
      groups: (groups of experts, how many of them a token reaches), of node-limited routing.
    """
    here, hops = n_experts // wire.ranks, wire.hops
    most = min(top_k, here)

    def slots(experts: int) -> int:
        wanted = wire.slack * tokens * _reach(top_k, n_experts, experts, groups)
        return max(1, min(tokens, math.ceil(wanted)))

    wanted = wire.slack * tokens * top_k / wire.ranks
    copies = max(most, min(tokens * most, math.ceil(wanted)))
    further = (-(-tokens * most // (copies - most + 1)) if copies < tokens * most else 1) - 1
    first = slots(n_experts // hops[0].ranks)
    if len(hops) == 1:
        return Capacity(first, copies, -(-tokens // first) + further)
    within = slots(here)
    further = hops[1].ranks * (further + -(-tokens // within) - 1)
    return Capacity(first, copies, -(-tokens // first) + further, within)


def _reach(top_k: int, n_experts: int, here: int, groups: tuple[int, int]) -> float:
    """The part of the tokens with at least one of `here` consecutive experts among `top_k` drawn evenly."""
    n_groups, reached = groups
    size = n_experts // n_groups
    if here % size and size % here:  # Ranks and groups cut across each other.
        n_groups, reached, size = 1, 1, n_experts
    total = math.comb(n_groups, reached)
    none = 0.0
    mine = max(1, here // size)  # Groups with experts of a rank ...
    for chosen in range(min(mine, reached) + 1):  # ... and how many of them a token reaches.
        if reached - chosen > n_groups - mine:
            continue
        part = math.comb(mine, chosen) * math.comb(n_groups - mine, reached - chosen) / total
        others = reached * size - chosen * min(here, size)
        none += part * math.comb(others, top_k) / math.comb(reached * size, top_k)
    return 1 - none


class Rounds(NamedTuple):
    """When each token goes to each rank; of two hops, to each node."""

    number: Int[Array, "tokens ranks"]  # -1: none of its experts is there.
    needed: Int[Array, ""]  # Rounds that the whole axis needs.


def rounds(indices: Int[Array, "tokens top_k"], n_experts: int, wire: Wire, room: Capacity) -> Rounds:
    """Fills round after round, in the order of the tokens, for each destination by itself."""
    here = n_experts // wire.ranks
    ranks = jnp.arange(wire.ranks, dtype=jnp.int32)
    copies = (indices[:, :, None] // here == ranks).sum(1, dtype=jnp.int32)
    shape = len(indices), wire.hops[0].ranks, -1  # By the first hop's destination.
    goes = (copies > 0).reshape(shape).any(2)
    if room.rounds == 1:
        return Rounds(jnp.where(goes, 0, -1), jnp.int32(1))

    def before(x: Array) -> Array:
        return jnp.cumsum(x, 0, dtype=jnp.int32) - x

    # The number grows whenever a round's tokens or its copies would run over; a token is never cut in two.
    full = room.copies - min(indices.shape[1], here) + 1
    over = before(copies) // full
    if room.within:
        over += before(copies > 0) // room.within
    number = before(goes) // room.slots + over.reshape(shape).sum(2)
    number = jnp.where(goes, number, -1).astype(jnp.int32)
    return Rounds(number, lax.pmax(number.max() + 1, wire.axis))


class Received(NamedTuple):
    """How what arrived is laid out by expert: as `dispatch.Dispatch`, of choices that are partly absent."""

    order: Int[Array, " copies"]  # The choice in each sorted row; past the sum of the sizes, any.
    row: Int[Array, "slots top_k"]  # The sorted row of each choice; `copies` where its expert is not here.
    group_sizes: Int[Array, " experts"]

    def collect(self, rows: Shaped[Array, "copies *d"]) -> Shaped[Array, "slots top_k *d"]:
        """The rows of each choice, zero where it is absent."""
        return rows.at[self.row].get(mode="fill", fill_value=0)


class Hop(NamedTuple):
    """Tokens of one rank to the slots of others, and back."""

    token: Int[Array, "ranks slots"]  # The token in each slot, by destination; `tokens` where it is empty.
    # A token's slot among all ranks' slots; their number where it has none.
    place: Int[Array, "tokens ranks"]
    rank: Int[Array, "tokens top_k"]  # Where each choice's expert is; `ranks` where it is absent.
    sent: Int[Array, " ranks"]
    received: Int[Array, " ranks"]
    wire: Wire

    def send(self, x: Shaped[Array, "tokens *d"]) -> Shaped[Array, "all_slots *d"]:
        """The slots that arrive on this rank."""
        slots = move(take(x, self.token), self.wire, self.sent, self.received)
        return slots.reshape(-1, *x.shape[1:])

    def home(self, slots: Float[Array, "all_slots d"]) -> Float[Array, "tokens d"]:
        """The transpose of `send`: what the ranks have in a token's slots, summed in float32."""
        back = self._back(slots)
        place, most = self.place, self.rank.shape[1]
        if place.shape[1] > most:  # A token reaches at most `top_k` ranks.
            place = jnp.sort(place, axis=1)[:, :most]
        parts = back.at[place].get(mode="fill", fill_value=0)
        return parts.astype(jnp.float32).sum(1).astype(slots.dtype)

    def choices_home(self, choices: Float[Array, "all_slots top_k"]) -> Float[Array, "tokens top_k"]:
        """Each choice from the rank where its expert is; zero if it did not go there."""
        back = self._back(choices)
        place = jnp.take_along_axis(self.place, self.rank, axis=1, mode="fill", fill_value=len(back))
        return back.at[place, jnp.arange(self.rank.shape[1])].get(mode="fill", fill_value=0)

    def _back(self, slots: Shaped[Array, "all_slots d"]) -> Shaped[Array, "all_slots d"]:
        by_source = slots.reshape(*self.token.shape, -1)
        return move(by_source, self.wire, self.received, self.sent).reshape(slots.shape)


class Exchange(NamedTuple):
    """One round's route, with the maps of `dispatch.Dispatch`; `copies` counts the rows on this rank."""

    hops: tuple[Hop, ...]
    there: Received

    @property
    def group_sizes(self) -> Int[Array, " experts"]:
        """Rows of each expert on this rank."""
        return self.there.group_sizes

    def send(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """The slots that arrive on this rank, of tokens along `axis`; a token travels once to each rank."""
        with jax.named_scope("dispatch"):
            x = x.T if axis else x
            for hop in self.hops:
                x = hop.send(x)
            return checkpoint_name(x.T if axis else x, "expert_arrived")

    def expand(self, arrived: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """A row for every copy, sorted by expert, of slots along `axis`."""
        return take(arrived, self.there.order // self.there.row.shape[1], axis)

    def spread(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """A row for every copy that arrives, sorted by expert, of tokens along `axis`."""
        return self.expand(self.send(x, axis), axis)

    def collect(self, rows: Float[Array, "copies d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's copies: on their rank, then on the way, each accumulated in float32."""
        return self.home(self.there.collect(rows).astype(jnp.float32).sum(1).astype(rows.dtype))

    def home(self, slots: Float[Array, "all_slots d"]) -> Float[Array, "tokens d"]:
        """The transpose of `send`."""
        with jax.named_scope("combine"):
            for hop in reversed(self.hops):
                slots = hop.home(slots)
            return slots

    def spread_gates(self, gates: Float[Array, "tokens top_k"]) -> Float[Array, " copies"]:
        """The gate of each row."""
        for hop in self.hops:
            gates = hop.send(gates)
        return gates.reshape(-1)[self.there.order]

    def collect_gates(self, rows: Float[Array, " copies"]) -> Float[Array, "tokens top_k"]:
        """The transpose of `spread_gates`: each choice's row, zero if another round has it."""
        choices = self.there.collect(rows)
        for hop in reversed(self.hops):
            choices = hop.choices_home(choices)
        return choices


def exchange(
    indices: Int[Array, "tokens top_k"],
    n_experts: int,
    wire: Wire,
    room: Capacity,
    when: Rounds,
    number: Int[Array, ""] | int,
) -> Exchange:
    """The route of round `number`; every rank of the axis calls it together."""
    hop, asked = _hop(indices, n_experts, wire.hops[0], room.slots, when.number == number)
    hops, here = (hop,), n_experts // hop.wire.ranks
    for within in wire.hops[1:]:
        goes = (asked[:, :, None] // (here // within.ranks) == jnp.arange(within.ranks)).any(1)
        hop, asked = _hop(asked, here, within, hop.wire.ranks * room.within, goes)
        hops, here = (*hops, hop), here // within.ranks
    return Exchange(hops, _receive(asked, here, wire.ranks * room.copies))


def _hop(
    indices: Int[Array, "tokens top_k"],
    n_experts: int,
    wire: Wire,
    slots: int,
    goes: Bool[Array, "tokens ranks"],
) -> tuple[Hop, Int[Array, "all_slots top_k"]]:
    """The hop, and which of a rank's experts each slot that arrives asks for; one past the last: none."""
    tokens, here = len(indices), n_experts // wire.ranks
    ranks = jnp.arange(wire.ranks, dtype=jnp.int32)
    slot = jnp.cumsum(goes, 0, dtype=jnp.int32) - 1
    which = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full((wire.ranks, slots), tokens, jnp.int32)
    # What does not go is put past the end, each in a place of its own, and dropped.
    at = jnp.where(goes, slot, slots + which)
    token = token.at[ranks, at].set(which, mode="drop", unique_indices=True)
    sent = goes.sum(0, dtype=jnp.int32)
    received = lax.all_to_all(sent, wire.axis, 0, 0, axis_index_groups=wire.peers, tiled=True)
    # Which experts of the destination a slot asks for; an empty slot asks for none.
    asked = indices.at[token].get(mode="fill", fill_value=n_experts) - (ranks * here)[:, None, None]
    asked = move(jnp.where((asked >= 0) & (asked < here), asked, here), wire, sent, received)
    if wire.transport in IN_USE:  # The others' slots did not travel.
        asked = jnp.where(jnp.arange(slots)[:, None] < received[:, None, None], asked, here)
    # Made by itself: fused into the sum in `home` it took 2.9 ms for 32k x 7168 on an H200, apart 0.5.
    place = lax.optimization_barrier(jnp.where(goes, ranks * slots + slot, wire.ranks * slots))
    return Hop(token, place, indices // here, sent, received, wire), asked.reshape(-1, indices.shape[1])


def _receive(asked: Int[Array, "all_slots top_k"], n_experts: int, copies: int) -> Received:
    """Sorts by expert what arrived; `n_experts` marks a choice that is absent."""
    flat = asked.reshape(-1)
    copies = min(copies, flat.size)
    order = jnp.argsort(flat, stable=True)[:copies].astype(jnp.int32)
    row = jnp.full_like(flat, copies).at[order].set(jnp.arange(copies, dtype=jnp.int32), unique_indices=True)
    row = lax.optimization_barrier(jnp.where(flat < n_experts, row, copies))  # As `place`.
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1, mode="drop")
    return Received(order, row.reshape(asked.shape), sizes)

"""Tokens to the devices that hold their experts and back, dropless: a route over one mesh axis.

    token --(once for each rank that holds some of its experts)--> rank --> a row for each of those experts
    sum over those rows, on the rank, in float32 --(once)--> sum over the ranks

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
from jaxtyping import Array, Float, Int, Shaped

from dsv3_jax.parallel.dispatch import take
from dsv3_jax.parallel.transport import Wire, move


class Capacity(NamedTuple):
    """What one rank sends to another in one round, at most."""

    slots: int  # Tokens.
    copies: int  # (Token, expert) pairs of theirs.
    rounds: int  # That any routing may need; 1: everything fits, always.


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
      wire: ranks and slack.
      groups: (groups of experts, how many of them a token reaches), of node-limited routing.
    """
    here = n_experts // wire.ranks
    most = min(top_k, here)
    wanted = wire.slack * tokens * _reach(top_k, n_experts, here, groups)
    slots = max(1, min(tokens, math.ceil(wanted)))
    wanted = wire.slack * tokens * top_k / wire.ranks
    copies = max(most, min(tokens * most, math.ceil(wanted)))
    by_copies = -(-tokens * most // (copies - most + 1)) if copies < tokens * most else 1
    return Capacity(slots, copies, -(-tokens // slots) + by_copies - 1)


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
    """When each token goes to each rank."""

    number: Int[Array, "tokens ranks"]  # -1: none of its experts is there.
    needed: Int[Array, ""]  # Rounds that the whole axis needs.


def rounds(indices: Int[Array, "tokens top_k"], n_experts: int, wire: Wire, room: Capacity) -> Rounds:
    """Fills round after round, in the order of the tokens, for each pair of ranks by itself."""
    here = n_experts // wire.ranks
    ranks = jnp.arange(wire.ranks, dtype=jnp.int32)
    copies = (indices[:, :, None] // here == ranks).sum(1, dtype=jnp.int32)
    goes = copies > 0
    if room.rounds == 1:
        return Rounds(jnp.where(goes, 0, -1), jnp.int32(1))
    # The number grows whenever a round's tokens or its copies would run over; a token is never cut in two.
    full = room.copies - min(indices.shape[1], here) + 1
    number = (jnp.cumsum(goes, 0) - goes) // room.slots + (jnp.cumsum(copies, 0) - copies) // full
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


class Exchange(NamedTuple):
    """One round's route, with the maps of `dispatch.Dispatch`; `copies` counts the rows on this rank."""

    token: Int[Array, "ranks slots"]  # The token in each slot, by destination; `tokens` where it is empty.
    place: Int[
        Array, "tokens ranks"
    ]  # A token's slot among all ranks' slots; their number where it has none.
    rank: Int[Array, "tokens top_k"]  # Where each choice's expert is.
    sent: Int[Array, " ranks"]
    received: Int[Array, " ranks"]
    there: Received
    wire: Wire

    @property
    def group_sizes(self) -> Int[Array, " experts"]:
        """Rows of each expert on this rank."""
        return self.there.group_sizes

    def send(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """The slots that arrive on this rank, of tokens along `axis`; a token travels once to each rank."""
        with jax.named_scope("dispatch"):
            x = x.T if axis else x
            slots = move(take(x, self.token), self.wire, self.sent, self.received)
            arrived = slots.reshape(-1, *x.shape[1:])
            return checkpoint_name(arrived.T if axis else arrived, "expert_arrived")

    def expand(self, arrived: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """A row for every copy, sorted by expert, of slots along `axis`."""
        return take(arrived, self.there.order // self.there.row.shape[1], axis)

    def spread(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """A row for every copy that arrives, sorted by expert, of tokens along `axis`."""
        return self.expand(self.send(x, axis), axis)

    def collect(self, rows: Float[Array, "copies d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's copies: on their rank, then over the ranks, each accumulated in float32."""
        return self.home(self.there.collect(rows).astype(jnp.float32).sum(1).astype(rows.dtype))

    def home(self, slots: Float[Array, "slots d"]) -> Float[Array, "tokens d"]:
        """The transpose of `send`: what the ranks have in a token's slots, summed in float32."""
        with jax.named_scope("combine"):
            back = self._back(slots)
            place, most = self.place, self.rank.shape[1]
            if place.shape[1] > most:  # A token reaches at most `top_k` ranks.
                place = jnp.sort(place, axis=1)[:, :most]
            parts = back.at[place].get(mode="fill", fill_value=0)
            return parts.astype(jnp.float32).sum(1).astype(slots.dtype)

    def spread_gates(self, gates: Float[Array, "tokens top_k"]) -> Float[Array, " copies"]:
        """The gate of each row."""
        arrived = move(take(gates, self.token), self.wire, self.sent, self.received)
        return arrived.reshape(-1)[self.there.order]

    def collect_gates(self, rows: Float[Array, " copies"]) -> Float[Array, "tokens top_k"]:
        """The transpose of `spread_gates`: each choice's row, zero if another round has it."""
        back = self._back(self.there.collect(rows))
        place = jnp.take_along_axis(self.place, self.rank, axis=1)
        choice = jnp.arange(self.rank.shape[1])
        return back.at[place, choice].get(mode="fill", fill_value=0)

    def _back(self, slots: Shaped[Array, "all_slots d"]) -> Shaped[Array, "all_slots d"]:
        by_source = slots.reshape(*self.token.shape, -1)
        return move(by_source, self.wire, self.received, self.sent).reshape(slots.shape)


def exchange(
    indices: Int[Array, "tokens top_k"],
    n_experts: int,
    wire: Wire,
    room: Capacity,
    when: Rounds,
    number: Int[Array, ""] | int,
) -> Exchange:
    """The route of round `number`; every rank of the axis calls it together."""
    tokens, here = len(indices), n_experts // wire.ranks
    goes = when.number == number
    ranks = jnp.arange(wire.ranks, dtype=jnp.int32)
    slot = jnp.cumsum(goes, 0, dtype=jnp.int32) - 1
    which = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full((wire.ranks, room.slots), tokens, jnp.int32)
    # What does not go is put past the end, each in a place of its own, and dropped.
    at = jnp.where(goes, slot, room.slots + which)
    token = token.at[ranks, at].set(which, mode="drop", unique_indices=True)
    sent = goes.sum(0, dtype=jnp.int32)
    received = lax.all_to_all(sent, wire.axis, 0, 0, tiled=True)
    # Which experts of the destination a slot asks for; an empty slot asks for none.
    asked = indices.at[token].get(mode="fill", fill_value=n_experts) - (ranks * here)[:, None, None]
    asked = move(jnp.where((asked >= 0) & (asked < here), asked, here), wire, sent, received)
    if wire.transport == "ragged":  # Slots that are not in use did not travel.
        asked = jnp.where(jnp.arange(room.slots)[:, None] < received[:, None, None], asked, here)
    there = _receive(asked, here, wire.ranks * room.copies)
    place = jnp.where(goes, ranks * room.slots + slot, wire.ranks * room.slots)
    return Exchange(token, place, indices // here, sent, received, there, wire)


def _receive(asked: Int[Array, "ranks slots top_k"], n_experts: int, copies: int) -> Received:
    """Sorts by expert what arrived; `n_experts` marks a choice that is absent."""
    flat = asked.reshape(-1)
    copies = min(copies, flat.size)
    order = jnp.argsort(flat, stable=True)[:copies].astype(jnp.int32)
    row = jnp.full_like(flat, copies).at[order].set(jnp.arange(copies, dtype=jnp.int32), unique_indices=True)
    row = jnp.where(flat < n_experts, row, copies)
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1, mode="drop")
    return Received(order, row.reshape(-1, asked.shape[-1]), sizes)

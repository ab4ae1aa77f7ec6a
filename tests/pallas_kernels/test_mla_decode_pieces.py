"""How `mla_decode` divides its work in strides: every block once, alike whatever comes with a sequence."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mla_decode import mosaic_gpu_pieces as pieces
from pallas_kernels.mla_decode.mosaic_gpu_pieces import BLOCK

lengths_of_a_batch = st.lists(st.integers(0, 6000), min_size=1, max_size=9)


@pytest.fixture(scope="module", autouse=True)
def at_once():
    """Loops that run as they are traced."""
    loop = types.SimpleNamespace(
        loop=lambda first, end, step: lambda body: [body(i) for i in range(first, end, step)],
        when=lambda condition: lambda body: body() if condition else None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "pl", loop)
        yield


def call_of(batch, capacity, groups, s_q=1):
    splits = pieces.splits(batch, groups)
    return types.SimpleNamespace(
        batch=batch, capacity=capacity, groups=groups, s_q=s_q, splits=splits, stride=splits
    )


def pieces_of(call, lengths):
    """(pieces as (b, part, blocks), bounds of the parts)."""
    found, bounds = [], np.full((call.batch, 2), -1)

    def work(b, part, length, first, count):
        assert length == min(lengths[b], call.capacity)
        found.append((int(b), int(part), [int(first + i * call.stride) for i in range(int(count))]))

    for group in range(call.groups):
        pieces.of_group(call, np.asarray(lengths), group)(bounds, work)
    return found, bounds


@settings(max_examples=15, deadline=None)
@given(lengths_of_a_batch, st.integers(1, 140))
def test_every_block_is_in_one_piece(lengths, groups):
    call = call_of(len(lengths), 5000, groups)
    found, bounds = pieces_of(call, lengths)
    parts = [part for _, part, _ in found]
    assert len(set(parts)) == len(parts)
    for b, length in enumerate(lengths):
        mine = [(part, blocks) for owner, part, blocks in found if owner == b]
        assert sorted(sum((blocks for _, blocks in mine), [])) == list(range(-(-min(length, 5000) // BLOCK)))
        assert sorted(part for part, _ in mine) == list(range(*bounds[b]))


@settings(max_examples=15, deadline=None)
@given(lengths_of_a_batch, lengths_of_a_batch, st.integers(1, 140))
def test_a_sequence_is_cut_alike_whatever_the_others_are(lengths, others, groups):
    others = (others * len(lengths))[: len(lengths) - 1]
    call = call_of(len(lengths), 5000, groups)
    found, _ = pieces_of(call, lengths)
    again, _ = pieces_of(call, [lengths[0], *others])
    assert sorted(piece for piece in found if not piece[0]) == sorted(
        piece for piece in again if not piece[0]
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 40), st.integers(0, 39))
def test_blocks_that_every_query_sees_whole(length, s_q, splits, first):
    call = types.SimpleNamespace(s_q=s_q, stride=splits)
    blocks = list(range(first, -(-length // BLOCK), splits))
    seen_by_all = [block for block in blocks if (block + 1) * BLOCK <= length - s_q + 1]
    assert pieces.seen_whole(call, length, first, len(blocks)) == len(seen_by_all)


@pytest.mark.parametrize("batch", [1, 5, 32, 128, 300])
def test_equal_lengths_keep_the_groups_busy(batch):
    """The longest turn, in blocks, is at most a quarter over an equal share."""
    for groups in (16, 66, 132):
        call = call_of(batch, 16384, groups)
        blocks = 16384 // BLOCK
        rounds = -(-batch * call.splits // groups)
        assert rounds * -(-blocks // call.splits) <= 1.25 * max(batch * blocks / groups, 1)

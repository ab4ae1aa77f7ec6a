"""Schedules beside the papers' figures, and every table proven; broken ones must be found."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.pipeline import NAMES, Op, ScheduleError, Value, build, place, stage_sizes
from dsv3_jax.pipeline.checks import check, check_buffers, check_operations, check_ticks


def words(schedule, rank):
    """The cells of a rank as in the figures: "F0", "F3B1"; stages are left out."""
    return " ".join("".join(f"{op.kind}{op.microbatch}" for op in cell) for cell in schedule.cells[rank])


def test_one_f_one_b_is_the_figure():
    # PipeDream-Flush (Megatron-LM, figure 3) with 4 ranks and 5 micro-batches.
    schedule = build("1f1b", 4, 5)
    assert words(schedule, 0) == "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4"
    assert words(schedule, 2) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"
    assert words(schedule, 3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"


def test_gpipe_is_the_figure():
    assert words(build("gpipe", 3, 3), 1) == "F0 F1 F2 B2 B1 B0"


def test_interleaved_is_the_figure():
    # Megatron-LM, figure 4: rank 0 of 4, two chunks, 8 micro-batches; its warm-up takes both chunks of 0-3,
    # then 4-5 of the first, and the first backward follows the next forward.
    schedule = build("interleaved", 4, 8, chunks=2)
    assert words(schedule, 0).startswith("F0 F1 F2 F3 F0 F1 F2 F3 F4 F5 F6 B0 F7 B1 F4 B2")
    stages = [cell[0].stage for cell in schedule.cells[0] if cell[0].kind == "F"]
    assert stages == [0] * 4 + [4] * 4 + [0] * 4 + [4] * 4
    first = next(i for i, cell in enumerate(schedule.cells[0]) if cell[0].kind == "B")
    assert first == 11 and schedule.cells[0][first] == (Op("B", 4, 0),)


def test_zb1p_delays_weights_more_on_later_ranks():
    # ZB-H1 (arXiv 2401.10241, figure 2 above) with 4 ranks.
    schedule = build("zb1p", 4, 6)
    assert words(schedule, 0) == "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5"
    assert words(schedule, 3) == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5"


def test_dualpipe_on_two_ranks_by_hand():
    # No fill, no wait: both ranks are innermost; 4 micro-batches, 0-1 from rank 0 and 2-3 from rank 1.
    schedule = build("dualpipe", 2, 4)
    assert words(schedule, 0) == "F0 F2 F1 B2 F3B0 B3 I1 W1"
    assert words(schedule, 1) == "F2 F0 F3 B0 F1B2 B1 I3 W3"
    assert schedule.stages_of(0) == (0, 1) and schedule.stages_of(1) == (1, 0)


def test_dualpipe_of_the_paper():
    # DeepSeek-V3 figure 5: 8 ranks, 20 micro-batches; rank 0 forwards 0-6 until the other end's 10 comes.
    schedule = build("dualpipe", 8, 20)
    assert words(schedule, 0).startswith(
        "F0 F1 F2 F3 F4 F5 F6 F10 I10 W10 F11 I11 W11 F12 I12 W12 F13 F7B13 F14B0"
    )
    assert words(schedule, 3).startswith("F0 F10 F1 F11 F2 F12 F3 F13 F4 B10 F14B0 F5B11 F15B1")
    mirrored = [
        tuple(op._replace(microbatch=(op.microbatch + 10) % 20) for op in c) for c in schedule.cells[0]
    ]
    assert mirrored == list(schedule.cells[7])


def test_dualpipev_turns_on_the_last_rank():
    schedule = build("dualpipev", 4, 10)
    assert schedule.paths == ((0, 1, 2, 3, 3, 2, 1, 0),)
    assert [schedule.stages_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    table = place(schedule)
    assert not [send for send in table.sends if send.value == Value("input", 4, send.value.microbatch)]


@st.composite
def schedules(draw):
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(1, 8))
    count = draw(st.integers(1, 24))
    chunks = draw(st.integers(2, 4))
    if name == "dualpipe":
        ranks += ranks % 2
        count = 2 * (count // 2 + ranks)
    if name == "dualpipev":
        count += 2 * ranks - 1
    if name == "interleaved":
        count = -(-count // ranks) * ranks
    return build(name, ranks, count, chunks=chunks)


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_every_table_is_proven(schedule):
    table = place(schedule)
    check(table)
    busy = sum(len(cells) for cells in schedule.cells)
    assert busy == sum(bool(cell) for row in table.ticks for cell in row)
    # Values only travel between neighbours of the ring, one of a kind and direction a tick.
    for send in table.sends:
        assert (send.target - send.source) % schedule.n_ranks in (1, schedule.n_ranks - 1)
    seen = [(send.tick, send.source, send.target, send.value.kind) for send in table.sends]
    assert len(seen) == len(set(seen))


def broken(table, **changes):
    return dataclasses.replace(table, **changes)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_shared_slots_are_found(name):
    table = place(build(name, 4, 12))
    # All inputs in one slot: somebody's input is overwritten while it is needed.
    slots = {value: 0 if value.kind == "input" else slot for value, slot in table.slots.items()}
    with pytest.raises(ScheduleError, match="overwrites .* still needed"):
        check_buffers(broken(table, slots=slots))
    # One slot fewer than the allocator took: no table fits.
    rank = max(range(4), key=lambda rank: table.n_slots["input"][rank])
    fewer = [size - (other == rank) for other, size in enumerate(table.n_slots["input"])]
    with pytest.raises(ScheduleError, match="has slot"):
        check_buffers(broken(table, n_slots={**table.n_slots, "input": tuple(fewer)}))


def test_an_early_read_is_found():
    table = place(build("dualpipe", 4, 8))
    tick = next(send.tick for send in table.sends)
    # The cells of the receiving rank one tick earlier: it reads what has not come yet.
    rank = table.sends[0].target
    rows = [list(row) for row in table.ticks]
    assert rows[tick + 1][rank] and not rows[tick][rank]
    rows[tick][rank], rows[tick + 1][rank] = rows[tick + 1][rank], ()
    with pytest.raises(ScheduleError, match="reads .* where None is"):
        check_buffers(broken(table, ticks=tuple(map(tuple, rows))))


def test_a_missing_or_false_send_is_found():
    table = place(build("1f1b", 3, 4))
    with pytest.raises(ScheduleError, match="sent as None"):
        check_buffers(broken(table, sends=table.sends[1:]))
    with pytest.raises(ScheduleError, match="is for rank"):
        check_buffers(broken(table, sends=(table.sends[0]._replace(tick=2), *table.sends[1:])))
    with pytest.raises(ScheduleError, match="sent twice"):
        check_buffers(broken(table, sends=(table.sends[0], *table.sends)))


def edited(schedule, rank, edit):
    cells = list(schedule.cells)
    cells[rank] = tuple(edit(list(cells[rank])))
    return dataclasses.replace(schedule, cells=tuple(cells))


def test_wrong_operations_are_found():
    schedule = build("zb1p", 3, 4)
    with pytest.raises(ScheduleError, match="F of micro-batch 0 on stage 1: 0 times"):
        check_operations(edited(schedule, 1, lambda cells: cells[1:]))
    with pytest.raises(ScheduleError, match="1 I, 0 W"):
        check_operations(edited(schedule, 1, lambda cells: cells[:-1]))
    with pytest.raises(ScheduleError, match="1 I, 2 W"):
        check_operations(edited(schedule, 1, lambda cells: [*cells, cells[-1]]))
    with pytest.raises(ScheduleError, match="not on its path"):
        check_operations(edited(schedule, 1, lambda cells: [*cells, (Op("W", 0, 0),)]))
    with pytest.raises(ScheduleError, match="one operation, or F with B or I"):
        check_operations(edited(schedule, 1, lambda cells: [*cells, (Op("W", 1, 0), Op("F", 1, 1))]))
    with pytest.raises(ScheduleError, match="overlaps a micro-batch with itself"):
        check_operations(edited(schedule, 1, lambda cells: [*cells, (Op("F", 1, 0), Op("B", 1, 0))]))
    table = place(schedule)
    with pytest.raises(ScheduleError, match="in order"):
        check_ticks(broken(table, schedule=edited(schedule, 1, lambda cells: cells[:-1])))


def test_ranks_that_wait_for_each_other_are_named():
    # Rank 0 wants its first gradient before the second forward; rank 1 wants the second forward first.
    schedule = build("1f1b", 2, 2)
    cells = list(schedule.cells)
    cells[0] = tuple((Op(kind, 0, m),) for kind, m in (("F", 0), ("B", 0), ("F", 1), ("B", 1)))
    cells[1] = tuple((Op(kind, 1, m),) for kind, m in (("F", 0), ("F", 1), ("B", 0), ("B", 1)))
    deadlock = dataclasses.replace(schedule, cells=tuple(cells))
    with pytest.raises(
        ScheduleError, match="rank 0 at B of micro-batch 0 on stage 0 waits for I of micro-batch 0 on"
    ):
        place(deadlock)


def test_weights_before_the_input_are_found():
    schedule = build("zb1p", 1, 1)
    table = place(schedule)
    rows = (table.ticks[0], table.ticks[2], table.ticks[1])
    with pytest.raises(ScheduleError, match="before its backward for the input"):
        check_buffers(broken(table, ticks=rows))
    with pytest.raises(ScheduleError, match="before its forward"):
        check_buffers(broken(table, ticks=(table.ticks[1], table.ticks[0], table.ticks[2])))


@pytest.mark.parametrize(
    "name, ranks, count, reason",
    [
        ("dualpipe", 7, 20, "ranks must be even"),
        ("dualpipe", 8, 21, "they must be even"),
        ("dualpipe", 8, 8, "at least two micro-batches a rank"),
        ("dualpipe", 3, 3, "meet in the middle.*must be even.*at least two"),
        ("dualpipev", 4, 7, "at least two micro-batches a rank"),
        ("interleaved", 4, 10, "multiple of ranks"),
        ("interleaved", 4, 1, "multiple of ranks"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(name, ranks, count, reason):
    with pytest.raises(ScheduleError, match=reason) as error:
        build(name, ranks, count)
    nearest = re.search(r"Nearest: (\w+) on (\d+) ranks with (\d+) micro-batches", str(error.value))
    assert nearest, error.value
    check(place(build(nearest[1], int(nearest[2]), int(nearest[3]))))


def test_other_refusals():
    with pytest.raises(ScheduleError, match="did you mean 'dualpipe'"):
        build("dualpip", 2, 4)
    with pytest.raises(ScheduleError, match="microbatches = 0; give at least 1"):
        build("1f1b", 2, 0)
    with pytest.raises(ScheduleError, match="one chunk a rank is 1f1b"):
        build("interleaved", 2, 4, chunks=1)
    with pytest.raises(ScheduleError, match="too few layers: 3 layers in 4 stages.*Nearest: 3 stages"):
        stage_sizes(3, 4)


def test_stage_sizes():
    assert stage_sizes(61, 16) == (3, *[4] * 13, 3, 3)
    assert stage_sizes(8, 4) == (2, 2, 2, 2)
    assert stage_sizes(6, 4) == (1, 2, 2, 1)

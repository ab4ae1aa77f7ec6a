"""The simulator beside the published formulas, exactly, and beside its own definition."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.pipeline import Durations, ScheduleError, build, place, simulate
from dsv3_jax.pipeline.simulator import parameters, peak_activations, simulate_in_step
from tests.pipeline.test_schedules import schedules

# All have forward = backward for the input >= weight, where the formulas of all schedules are exact.
EXACT = {
    "equal": Durations(1, 2, 1),
    "light weights": Durations(4, 7, 3, 9),
    "full overlap": Durations(2, 4, 2, 4),
}
LENGTHS = range(2, 17)
SHARES = range(1, 9)


def published(name, pp, d):
    """DeepSeek-V3 table 2: (bubble, stages of parameters a rank, activations)."""
    f, b, w, fb = d.forward, d.backward, d.weight, d.both
    return {
        "1f1b": ((pp - 1) * (f + b), 1, pp),
        "zb1p": ((pp - 1) * (f + b - 2 * w), 1, pp),
        "dualpipe": ((Fraction(pp, 2) - 1) * (fb + b - 3 * w), 2, pp + 1),
        "dualpipev": ((Fraction(pp, 2) - 1) * (fb + b - 3 * w), 2, pp + 1),
    }[name]


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_table_2_of_the_paper(name):
    done = 0
    for pp in LENGTHS:
        if name.startswith("dual") and pp % 2:
            continue
        for share in SHARES:
            if name == "dualpipe" and share == 1:  # Two micro-batches a rank at least; tested to be refused.
                continue
            schedule = build(name, pp // 2 if name == "dualpipev" else pp, share * pp)
            held, activations = parameters(schedule), peak_activations(schedule)
            for durations, d in EXACT.items():
                if durations != "light weights" and share not in (2, 8):
                    continue  # Special cases of the other.
                if durations == "full overlap" and not name.startswith("dual"):
                    continue  # Without F&B it is "equal", twice as long.
                done += 1
                bubble, *rest = published(name, pp, d)
                timeline, where = simulate(schedule, d), (durations, pp, share)
                assert timeline.bubble == bubble, where
                assert [{rest[0]}, rest[1]] == [set(held), max(activations)], where
                if d.overlapped is None:
                    # Every rank then works equally long, so each idles exactly that much.
                    assert set(timeline.idle) == {bubble}, where
    assert done >= 7 * 8 + 2 * 8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4), st.integers(1, 9), st.integers(2, 9))
def test_formulas_that_hold_for_any_durations(ranks, groups, chunks, forward, backward):
    d = Durations(forward, backward, 1)
    for name in ("gpipe", "1f1b", "interleaved"):
        schedule = build(name, ranks, groups * ranks, chunks=chunks)
        assert set(simulate(schedule, d).idle) == {(ranks - 1) * (forward + backward)}
    # Megatron-LM, section 2.2: `chunks` times as many stages take 1/chunks each, and so does the bubble.
    schedule = build("interleaved", ranks, groups * ranks, chunks=chunks)
    part = simulate(schedule, d.scaled(Fraction(1, chunks)))
    assert part.bubble * chunks == (ranks - 1) * (forward + backward)
    # Its memory, same section: p (1 + (p - 1) / (p chunks)) activations of a rank, times `chunks` in ours.
    if groups > 1:
        assert max(peak_activations(schedule)) == ranks * chunks + ranks - 1


@settings(max_examples=100, deadline=None)
@given(
    schedules(),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.data(),
)
def test_every_cell_starts_as_soon_as_it_can(schedule, forward, for_input, weight, send, data):
    backward = for_input + weight
    overlapped = data.draw(st.integers(max(forward, backward), forward + backward))
    sizes = data.draw(
        st.none() | st.lists(st.integers(1, 3), min_size=schedule.n_stages, max_size=schedule.n_stages)
    )
    d = Durations(forward, backward, weight, overlapped, send)
    timeline = simulate(schedule, d, sizes)
    end = {}
    for rank, (cells, spans) in enumerate(zip(schedule.cells, timeline.spans, strict=True)):
        for cell, (_, stop) in zip(cells, spans, strict=True):
            end |= {(op.kind, op.stage, op.microbatch): (stop, rank) for op in cell}
    alone = {"F": forward, "B": backward, "I": for_input, "W": weight}
    for rank, (cells, spans) in enumerate(zip(schedule.cells, timeline.spans, strict=True)):
        before = 0
        for cell, (start, stop) in zip(cells, spans, strict=True):
            limits = [before]
            for kind, stage, m in cell:
                needs = {
                    "F": [("F", stage - 1, m)],
                    "W": [("I", stage, m)],
                }.get(kind, [("F", stage, m), ("B", stage + 1, m), ("I", stage + 1, m)])
                limits += [end[k][0] + (send if end[k][1] != rank else 0) for k in needs if k in end]
            # Not before its operands, and as no rank waits without a reason, at the last of them.
            assert start == max(limits)
            size = [1 if sizes is None else sizes[op.stage] for op in cell]
            work = sum(alone[op.kind] * part for op, part in zip(cell, size, strict=True))
            gain = (forward + backward - overlapped) * min(size) if len(cell) == 2 else 0
            assert stop - start == work - gain
            before = stop
    assert timeline.makespan == max(stop for stop, _ in end.values())
    assert 0 <= timeline.bubble_fraction < 1


def test_peak_activations_by_hand():
    # 1F1B on 3 ranks: 3, 2, 1. A GPipe holds everything. ZB1P holds as much on each rank as on the first.
    assert peak_activations(build("1f1b", 3, 6)) == (3, 2, 1)
    assert peak_activations(build("gpipe", 3, 6)) == (6, 6, 6)
    assert peak_activations(build("zb1p", 3, 6)) == (3, 3, 3)
    assert set(peak_activations(build("dualpipe", 8, 20))) == {9}


def test_dualpipe_outside_the_formula():
    # Backward for the input longer than forward: the bubble is below the published (PP/2-1)(F&B + B - 3W).
    schedule, d = build("dualpipe", 4, 8), Durations(10, 20, 9, 25)
    assert published("dualpipe", 4, d)[0] == 18 and simulate(schedule, d).bubble == 17
    # Shorter than forward: above it.
    d = Durations(3, 3, 1, 5)
    assert published("dualpipe", 4, d)[0] == 5 and simulate(schedule, d).bubble == 6


def test_an_overlap_of_unlike_stages_hides_what_the_shorter_can():
    # Two ranks, stage 1 three times stage 0; F&B of both saves (1 + 2 - 2) * 1.
    timeline = simulate(build("dualpipe", 2, 4), Durations(1, 2, 1, 2), sizes=(1, 3))
    overlapped = [
        stop - start
        for cells, spans in zip(timeline.schedule.cells, timeline.spans, strict=True)
        for cell, (start, stop) in zip(cells, spans, strict=True)
        if len(cell) == 2
    ]
    assert overlapped == [3 * 1 + 1 * 2 - 1, 3 * 1 + 1 * 2 - 1] and timeline.makespan > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(forward=0), "must be above 0"),
        (dict(weight=2), "weight = 2, backward = 2.*make it longer"),
        (dict(overlapped=1), "overlapped = 1.*2 to 3"),
        (dict(overlapped=4), "overlapped = 4.*2 to 3"),
        (dict(send=-1), "send at least 0"),
    ],
)
def test_impossible_durations_are_refused(fields, message):
    with pytest.raises(ScheduleError, match=message):
        Durations(**fields)


def test_sizes_for_each_stage():
    with pytest.raises(ScheduleError, match="sizes has 2 numbers; 1f1b has 3 stages"):
        simulate(build("1f1b", 3, 3), Durations(), sizes=(1, 1))


def test_ranks_that_step_together_wait_for_the_longest_cell_of_a_tick():
    def step(name, ranks, count):
        schedule = build(name, ranks, count)
        return simulate(schedule, units).makespan, simulate_in_step(place(schedule), units).makespan

    units = EXACT["equal"]
    for name in ("gpipe", "zb1p"):  # All cells of a tick are equally long.
        assert len(set(step(name, 4, 16))) == 1
    # 1F1B: in nearly every tick some rank does B, and those that do F wait for it.
    free, together = step("1f1b", 4, 16)
    ticks = place(build("1f1b", 4, 16)).ticks
    assert together == sum(2 if any(op.kind == "B" for cell in row for op in cell) else 1 for row in ticks)
    assert together > free == 3 * (16 + 3)


def test_ranks_that_wait_for_what_is_sent_to_them_alone():
    # Two ranks, two micro-batches, F 1, B 3: rank 0 sends F0 at 1 and F1 at 2; rank 1 sends B0 at 5, B1 at 9.
    table, d = place(build("1f1b", 2, 2)), Durations(1, 3, 1)
    alone = simulate_in_step(table, d, senders_wait=False)
    assert alone.spans == (((0, 1), (1, 2), (5, 8), (9, 12)), ((1, 2), (2, 5), (5, 6), (6, 9)))
    # The loop takes 1 after every tick: after F0 on rank 0 and after the four cells on rank 1.
    assert simulate_in_step(table, d, senders_wait=False, between=1).makespan == 12 + 5
    # A send takes 1/2 of both ranks: F0 and F1 come at 1.5 and 3, B0 leaves rank 1 at 6.5 and B1 at 11.
    spans = simulate_in_step(table, dataclasses.replace(d, send=0.5), senders_wait=False).spans
    assert spans[0] == ((0, 1), (1.5, 2.5), (6.5, 9.5), (11, 14))
    assert spans[1] == ((1.5, 2.5), (3, 6), (6.5, 7.5), (7.5, 10.5))
    # DualPipe's two ranks do alike in every tick: each way adds its time, and the two of a tick add twice.
    table = place(build("dualpipe", 2, 8))
    ways = {(send.tick, send.value.kind) for send in table.sends}
    assert len(ways) == 8 and len({tick for tick, _ in ways}) == 6
    steps = [
        simulate_in_step(table, dataclasses.replace(d, send=send), senders_wait=False).makespan
        for send in (0, 1)
    ]
    assert steps[1] - steps[0] == 8
    # ZB1P, whose cells of a tick differ: a sender that goes on is between all that meet and none that wait.
    schedule, d = build("zb1p", 2, 8), Durations(1, 5, 3)
    table = place(schedule)
    steps = [simulate_in_step(table, d, senders_wait=wait).makespan for wait in (False, True)]
    assert simulate(schedule, d).makespan <= steps[0] < steps[1]

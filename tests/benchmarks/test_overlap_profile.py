"""What a profile says of exchanges, on a program and events written by hand."""

from benchmarks.overlap_profile import PROFILED, beside_exchanges
from benchmarks.profile_events import Event

# The text leaves out what asynchronous starts wrap: here all_to_all.54 and .101, names that are made up.
TEXT = """HloModule step

ENTRY %main {
  %all-to-all-start.9 = (f32[2]) all-to-all-start(%x), metadata={op_name="jit(step)/jvp(T)/combine/a"}
  %gemm.1 = f32[2] custom-call(%y), metadata={op_name="jit(step)/jvp(T)/shared_experts/shared/dot"}
  %all-to-all-done.9 = f32[2] all-to-all-done(%all-to-all-start.9)
  %all-to-all-start.10 = (f32[2]) all-to-all-start(%x), metadata={op_name="transpose(jvp(T))/dispatch/a"}
  %all-to-all-done.10 = f32[2] all-to-all-done(%all-to-all-start.10)
  %all-to-all.3 = f32[2] all-to-all(%z), metadata={op_name="jit(step)/jvp(T)/route/a"}
}
"""
EVENTS = [
    Event(0, 0, 2, "ncclSend", "all_to_all.54.1"),
    Event(0, 0.5, 1.5, "gemm", "gemm.1"),
    Event(0, 2, 5, "ncclSend", "all_to_all.101.1"),
    Event(0, 5, 9, "ncclSend", "all-to-all.3"),
    Event(0, 9, 10, "ncclGather", "all-gather.3"),  # Of no line of the text.
]


def test_exchanges_have_the_labels_of_their_starts():
    found = beside_exchanges(EVENTS, TEXT)[0]
    ms = {kind: times["ms"] * PROFILED for kind, times in found["collectives"].items()}
    assert ms == {
        "forward combine all-to-all": 2,
        "backward dispatch all-to-all": 3,
        "forward route all-to-all": 4,
        "other all-gather": 1,
    }
    assert found["collectives"]["forward combine all-to-all"]["under computation"] * PROFILED == 1
    beside = found["beside"]["forward combine all-to-all"]
    assert {part: ms * PROFILED for part, ms in beside["beside"].items()} == {"forward shared_experts": 1}
    assert found["beside"]["backward dispatch all-to-all"]["beside"] == {}


def test_exchanges_without_a_start_each_are_not_guessed():
    (event,) = [event for event in EVENTS if event.instruction == "all_to_all.54.1"]
    assert list(beside_exchanges([event], TEXT)[0]["collectives"]) == ["other all-to-all"]

"""The live line, the metrics file through kills and resumes, and TensorBoard's own reader's view."""

import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.training.report import METRICS_FILE, MetricsLog, Progress, Report, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(step, **more):
    return {"step": step, "tokens": 2048 * step, "loss": 1 / step, "mtp_loss": [0.1 * step], **more}


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_floats_read_back_bit_for_bit(tmp_path, single, double):
    path = tmp_path / "exact.jsonl"
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    log.write({"step": 1, "loss": np.float32(single), "device": jnp.float32(single), "rate": double})
    log.close()
    (read,) = read_metrics(path)
    assert struct.pack("f", read["loss"]) == struct.pack("f", single)
    assert struct.pack("f", read["device"]) == struct.pack("f", float(jnp.float32(single)))
    assert struct.pack("d", read["rate"]) == struct.pack("d", double)


def test_arrays_large_integers_and_non_finite_values(tmp_path):
    log = MetricsLog(tmp_path / METRICS_FILE)
    log.write(
        {"step": 3, "tokens": 14_800_000_000_001, "mtp_loss": jnp.array([0.5, jnp.nan]), "loss": np.inf}
    )
    log.close()
    text = (tmp_path / METRICS_FILE).read_text()
    # Strict JSON, as jq and JavaScript read it.
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 3, "tokens": 14_800_000_000_001, "mtp_loss": [0.5, None], "loss": None,
    }  # fmt: skip


def test_each_line_is_with_the_operating_system_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path / METRICS_FILE)
    for step in (1, 2):
        log.write(record(step))
        assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == list(range(1, step + 1))
    log.close()


@given(st.integers(0, 12), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_anywhere_and_resumed_equals_unbroken(tmp_path, resumed, logged, data):
    """Whatever byte the kill cut at, the file after the resume has each step once, as in one go."""
    path, last = tmp_path / METRICS_FILE, 14
    resumed = min(resumed, logged)
    whole = "".join(json.dumps(record(step)) + "\n" for step in range(1, logged + 1))
    # A step that has a checkpoint was logged before it: the cut comes after the line of `resumed`.
    safe = len("".join(json.dumps(record(step)) + "\n" for step in range(1, resumed + 1)))
    path.write_text(whole[: data.draw(st.integers(safe, len(whole)))])

    log = MetricsLog(path, resumed_step=resumed)
    for step in range(resumed + 1, last + 1):
        log.write(record(step))
    log.close()
    assert path.read_text() == "".join(json.dumps(record(step)) + "\n" for step in range(1, last + 1))


def test_a_fresh_start_in_a_used_directory_starts_a_fresh_file(tmp_path):
    (tmp_path / METRICS_FILE).write_text(json.dumps(record(1)) + "\n")
    MetricsLog(tmp_path / METRICS_FILE, resumed_step=0).close()
    assert (tmp_path / METRICS_FILE).read_text() == ""


def test_a_terminal_sees_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream, now = Terminal(), iter([100.0, 110.0, 130.0])
    progress = Progress(300, stream, clock=lambda: next(now))
    values = {"loss": 2.34567, "tokens_per_second": 12345.6, "max_vio": [0.03, 0.11], "learning_rate": 9.8e-4}
    progress.update({"step": 10, **values})
    progress.update({"step": 20, **values})  # 1 s a step.
    progress.note("checkpoint saved")
    progress.update({"step": 30, **values, "bad_steps": 2})  # 2 s a step: 0.7 * 1 + 0.3 * 2 = 1.3.
    progress.close()
    common = "loss 2.3457  12,346 tokens/s  MaxVio 0.11  lr 9.80e-04"
    clear = "\r\x1b[K"
    assert stream.getvalue() == (
        f"{clear}step 10/300  {common}"
        f"{clear}step 20/300  {common}  ETA 4:40"
        f"{clear}checkpoint saved\nstep 20/300  {common}  ETA 4:40"
        f"{clear}step 30/300  {common}  ETA 5:51  2 bad steps\n"
    )


def test_a_narrow_terminal_is_not_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Progress(300, stream).update({"step": 10, "loss": 2.0, "tokens_per_second": 1e9})
    assert stream.getvalue() == "\r\x1b[Kstep 10/300  loss 2"


def test_a_file_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress(2, stream)
    progress.update({"step": 1, "loss": None, "bad_steps": 1})
    progress.note("a note")
    progress.update({"step": 2, "loss": 1.5, "validation_loss": 1.25})
    progress.close()
    assert (
        stream.getvalue()
        == "step 1/2  loss nan  1 bad step\na note\nstep 2/2  loss 1.5000  validation 1.2500\n"
    )


def read_events(directory):
    """Scalars of an event file, read with TFRecord framing and the event protocol buffer."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                scalars[(value.tag, event.step)] = value.simple_value
    return scalars


def test_report_feeds_all_three(tmp_path):
    stream = io.StringIO()
    report = Report(tmp_path, total_steps=4, stream=stream)
    for step in (1, 2):
        report.log(record(step, loss=jnp.float32(step), max_vio=np.array([0.5, 0.25]), grad_norm=math.nan))
    report.note("done")
    report.close()
    assert stream.getvalue().splitlines()[-1] == "done"
    assert [r["loss"] for r in read_metrics(tmp_path / METRICS_FILE)] == [1.0, 2.0]
    events = read_events(tmp_path / "tensorboard")
    assert events[("loss", 2)] == 2.0 and events[("max_vio/1", 1)] == 0.25 and events[("mtp_loss/0", 2)] > 0
    assert not any(tag == "grad_norm" for tag, _ in events)  # Not finite: left out.

    report = Report(tmp_path, total_steps=4, resumed_step=1, stream=stream)
    report.log(record(2, loss=7.0))
    report.close()
    assert [r["loss"] for r in read_metrics(tmp_path / METRICS_FILE)] == [1.0, 7.0]


def test_importing_the_report_does_not_import_tensorboard():
    code = "import sys, dsv3_jax.training.report; assert 'tensorboardX' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

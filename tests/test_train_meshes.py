"""A run goes on under another mesh and on fewer devices."""

import signal

import pytest

from tests import running
from tests.running import STEPS, checkpoint_steps, curve, end, lines, noise, unbroken, until

runner = running.runner
# Sums over devices are taken in another order. A float32 rounding is 6e-8; sums of some hundred terms,
# carried through 30 steps, differ by 6e-7 here. A batch or moment that went astray moves the third digit.
TOLERANCE = 5e-6


def test_continues_on_fewer_devices_and_other_meshes(runner, tmp_path):
    workdir, last = tmp_path / "run", 0
    stages = [(8, ("mesh.data=8", "mesh.sharding=zero1")), (4, ("mesh.data=2", "mesh.expert=2"))]
    for devices, options in stages:
        process = runner.start(workdir, *options, devices=devices)
        until(lambda n=last: lines(workdir / "metrics.jsonl") >= n + 6, process, workdir)
        process.send_signal(signal.SIGTERM)
        ended = end(process, workdir)
        assert ended.code == 0 and noise(ended.output) == [], ended
        assert f"on {devices} x cpu" in ended.output
        assert not last or f"resumed at step {last}" in ended.output
        last = checkpoint_steps(workdir)[-1]
        assert f"stopped on request after step {last}: saved" in ended.output
    assert last < STEPS
    ended = runner.run(workdir)
    assert ended.code == 0 and f"resumed at step {last}" in ended.output
    ours, expected = curve(workdir), curve(unbroken(runner))
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for mine, theirs in zip(ours, expected, strict=True):
        for name in ("loss", "ce_loss", "mtp_loss", "grad_norm", "balance_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE), (mine["step"], name)
        for name in ("tokens", "learning_rate", "max_vio"):  # Counts of tokens are exact.
            assert mine[name] == theirs[name], (mine["step"], name)

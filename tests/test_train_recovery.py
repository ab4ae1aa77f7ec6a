"""What a run leaves, and what it says when it cannot go on: one message, an exit code, no traceback."""

import json

import pytest

from dsv3_jax.training.report import read_metrics
from tests import running
from tests.running import STEPS, checkpoint_steps, curve, noise, unbroken
from tests.training.test_report import read_events

runner = running.runner
# What every line of `metrics.jsonl` holds.
KEYS = (
    "step tokens loss ce_loss mtp_loss balance_loss max_vio grad_norm learning_rate bad_steps"
    " tokens_per_second"
).split()


def test_what_a_run_leaves(runner):
    workdir = unbroken(runner)
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert set(KEYS) <= record.keys()
        assert len(record["mtp_loss"]) == 1 and record["tokens"] == record["step"] * 8 * 16
        assert ("validation_loss" in record) == (record["step"] % 10 == 0)
        assert all(record[name] is not None for name in KEYS)
    events = read_events(workdir / "tensorboard")
    for record in records:  # Events hold float32.
        assert events[("loss", record["step"])] == pytest.approx(record["loss"], rel=1e-6)
    for name in ("loss.png", "expert_load.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == STEPS and config["data"]["source"].endswith("*.txt")
    # The last two, and the best of those that were evaluated.
    losses = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    assert checkpoint_steps(workdir) == sorted({STEPS - 2, STEPS, min(losses, key=losses.get)})
    assert not list(workdir.rglob("*.tmp"))


def test_the_progress_line_is_live_on_a_terminal(runner):
    text = (unbroken(runner).parent / "terminal").read_bytes().decode()
    rewritten = [part for part in text.split("\r\x1b[K") if part.startswith("step ")]
    assert [part.split()[1] for part in rewritten[:STEPS]] == [f"{n}/{STEPS}" for n in range(1, STEPS + 1)]
    assert all("\n" not in part for part in rewritten[: STEPS - 1])  # One line, rewritten in place.
    assert all("tokens/s" in part and "MaxVio" in part for part in rewritten)
    assert "ETA" in rewritten[3]


def test_a_finished_run_is_finished_again(runner, tmp_path):
    """And leaves a sample of text, which the other runs here do without."""
    workdir = running.copy(unbroken(runner), tmp_path / "run")
    for name in ("loss.png", "expert_load.png"):
        (workdir / name).unlink()
    ended = runner.run(workdir, "train.sample_tokens=8")
    assert ended.code == 0 and f"resumed at step {STEPS}" in ended.output
    assert (workdir / "loss.png").exists() and (workdir / "expert_load.png").exists()
    assert (workdir / "sample.txt").read_text(encoding="utf-8").startswith("def ")
    assert curve(workdir) == curve(unbroken(runner))


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(runner, tmp_path):
    workdir = running.copy(unbroken(runner), tmp_path / "run")
    victim = max((workdir / f"checkpoints/{STEPS}/state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    ended = runner.run(workdir)
    assert ended.code == 0 and noise(ended.output) == []
    newest = workdir / "checkpoints" / str(STEPS)
    first, second, *_ = ended.output.splitlines()
    assert first.startswith(f"checkpoint {newest} is damaged: {victim.relative_to(newest)}: contents changed")
    assert second == f"moved it to {newest}.damaged"
    assert f"resumed at step {STEPS - 2}" in ended.output
    assert curve(workdir) == curve(unbroken(runner))


def test_when_all_are_damaged_there_is_no_silent_fresh_start(runner, tmp_path):
    workdir = running.copy(unbroken(runner), tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_bytes()
    for step in checkpoint_steps(workdir):
        (workdir / f"checkpoints/{step}/extras/metadata").unlink()
    ended = runner.run(workdir)
    assert ended.code == 3
    assert ended.output.splitlines()[-1] == (
        f"This run cannot be resumed. {workdir / 'checkpoints'} holds checkpoints, but none of them is sound "
        "(see the *.damaged folders there). Put a sound copy back, or start anew in another --workdir."
    )
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_model_is_refused_with_field_value_and_fix(runner, tmp_path):
    workdir = running.copy(unbroken(runner), tmp_path / "run")
    before = (workdir / "config.json").read_bytes()
    ended = runner.run(workdir, "model.d_ff=48", "model.moe.d_ff_expert=24", "train.ema_decay=0.9")
    assert ended.code == 3
    head, *lines, fix = ended.output.splitlines()
    assert head == (
        f"This run cannot be resumed. The state in {workdir / 'checkpoints' / str(STEPS)} is not that of "
        "this config:"
    )
    assert lines[:3] == [
        "  model.d_ff is 32 in the checkpoint and 48 here",
        "  model.moe.d_ff_expert is 16 in the checkpoint and 24 here",
        "  train.ema_decay is 0.0 in the checkpoint and 0.9 here",
    ]
    assert fix == "Set the fields back to what the checkpoint has, or use another --workdir to start anew."
    assert (workdir / "config.json").read_bytes() == before


def test_other_data_is_refused(runner, tmp_path):
    workdir = running.copy(unbroken(runner), tmp_path / "run")
    running.write_texts(tmp_path / "texts", seed=1)
    ended = runner.run(workdir, f"data.source=files:{tmp_path / 'texts'}/*.txt")
    assert ended.code == 3
    (line,) = ended.output.splitlines()
    assert line.startswith("This run cannot be resumed. data.source = ")
    assert "the saved position is of other data" in line and "restore that, or" in line


# Steps 6, and 25 on, get a loss that is infinite; step 23 a finite one far above the mean.
INJECTION = """
import sys, train
from dsv3_jax.training import loop
given = loop.schedules_at
def schedules_at(config, step, tokens):
    weight = {6: float("inf"), 23: 10.0}.get(step + 1, float("inf") if step + 1 >= 25 else 0.3)
    return given(config, step, tokens)._replace(mtp_weight=loop.np.float32(weight))
loop.schedules_at = schedules_at
sys.exit(train.main(sys.argv[1:]))
"""


def test_bad_steps_change_nothing_are_counted_and_three_in_a_row_stop_the_run(runner, tmp_path):
    workdir = tmp_path / "run"
    ended = runner.run(workdir, "train.log_every=4", program=("-c", INJECTION))
    assert ended.code == 3
    output = ended.output.splitlines()
    assert "step 6 was not finite and changed nothing; data: " in ended.output
    assert [line for line in output if line.startswith("loss spike at step 23: ")]
    assert (
        sum("was not finite" in line for line in output) == 3
    )  # 6, 25 and 26; the message for 27 is the last.
    assert output[-1].startswith("3 steps in a row with a loss or gradient that is not finite, the last of ")
    assert "step 27 (data: " in output[-1] and ".txt" in output[-1] and "optimizer.peak_lr" in output[-1]
    by_step = {record["step"]: record for record in read_metrics(workdir / "metrics.jsonl")}
    # Bad steps are on record whatever `log_every` is.
    assert by_step[6]["loss"] is None and by_step[6]["bad_steps"] == 1
    assert by_step[8]["loss"] is not None and by_step[8]["bad_steps"] == 1
    assert by_step[27]["bad_steps"] == 4 and max(by_step) == 27
    assert {6, 8, 25, 26, 27} <= by_step.keys() and 7 not in by_step

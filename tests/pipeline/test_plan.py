"""Charts, and `dsv3 plan`."""

import re

import numpy as np
import pytest

from dsv3_jax.cli import main
from dsv3_jax.pipeline import Durations, build, chart, simulate


def test_text_by_hand():
    # One column more than the label "F0" a unit of time; a backward takes two units.
    assert chart.text(simulate(build("1f1b", 2, 2), Durations())).split("\n") == [
        "rank 0 F0.F1.      B0....   B1....",
        "rank 1    F0.B0....F1.B1....",
    ]


def test_text_of_overlap_and_second_chunks():
    chart_text = chart.text(simulate(build("dualpipe", 2, 4), Durations()))
    # Rank 0 holds direction 1, whose micro-batches count from 0 again, as its second chunk.
    assert chart_text.split("\n")[0] == "rank 0 F0.f0.F1.b0....f1&B0....b1....I1.W1."


@pytest.mark.parametrize("width", [0, 60, 100])
def test_no_cell_is_lost_when_lines_wrap(width):
    schedule = build("zb1p", 4, 9)
    chart_text = chart.text(simulate(schedule, Durations()), width)
    rows = [[line for line in chart_text.split("\n") if line.startswith(f"rank {r}")] for r in range(4)]
    for rank, lines in enumerate(rows):
        assert width == 0 or max(map(len, lines)) <= width
        joined = "".join(line[7:].ljust(max(width - 7, 0)) for line in lines)
        want = [f"{op.kind}{op.microbatch}" for (op,) in schedule.cells[rank]]
        assert re.findall(r"[FIW]\d", joined) == want


def test_the_picture_shows_what_is_idle(tmp_path):
    from matplotlib import image

    # Two schedules of the same size; the one with the larger bubble leaves more white between its cells.
    def white(name):
        path = tmp_path / f"{name}.png"
        chart.png(simulate(build(name, 4, 8), Durations()), path)
        pixels = image.imread(path)[..., :3]
        height, width = pixels.shape[:2]
        # The middle of the picture is axes alone.
        middle = pixels[int(0.3 * height) : int(0.6 * height), int(0.1 * width) : int(0.95 * width)]
        return float(np.mean(np.all(middle == 1, axis=-1)))

    assert white("1f1b") > white("zb1p") + 0.05


def test_plan(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = ["plan", "--pipeline=dualpipe", "--ranks=8", "--microbatches=20", f"--png={picture}"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "step         66\n" in out
    # (8/2 - 1)(F&B + B - 3W) = 3 (3 + 2 - 3).
    assert "bubble       6, by the paper's formula 6;" in out
    assert "activations  9 of a stage" in out and "parameters   2 of 8 stages" in out
    assert "rank 7 f0.f1." in out and picture.stat().st_size > 1000
    # All on the same work; DualPipeV's stages are half as long: (16/2 - 1) (3 + 2 - 3) / 2 = 7.
    assert re.search(r"1f1b +81 +21 +25\.9% +8 +1\n", out)
    assert re.search(r"zb1p +67 +7 +10\.4% +8 +1\n", out)
    assert re.search(r"dualpipe +66 +6 +9\.1% +9 +2\n", out)
    assert re.search(r"dualpipev +67 +7 +10\.4% +8\.5 +1\n", out)
    assert re.search(r"interleaved .*multiple of ranks\n", out)


def test_plan_with_measured_times_and_uneven_layers(capsys):
    arguments = "plan --pipeline 1f1b --ranks 2 --microbatches 3 --layers 3 --no-chart --send 0.25"
    assert main([*arguments.split(), "--forward=1.5", "--backward=3", "--weight=1.2"]) == 0
    out = capsys.readouterr().out
    assert "layers       2 1 by stage" in out
    # In units of the mean, 1.5 layers.
    schedule = build("1f1b", 2, 3)
    step = simulate(schedule, Durations(1.5, 3, 1.2, None, 0.25), [2 / 1.5, 1 / 1.5]).makespan
    assert f"step         {step:g}\n" in out
    assert "formula" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--pipeline dualpipe --ranks 7 --microbatches 20", "Nearest: dualpipe on 8 ranks with 20"),
        ("--pipeline zb1p --ranks 4 --microbatches 8 --layers 3", "every stage needs a layer"),
        ("--pipeline zb1p --ranks 4 --microbatches 8 --weight 3", "make it longer"),
        ("--pipeline dualpip --ranks 4 --microbatches 8", "did you mean 'dualpipe'"),
    ],
)
def test_what_cannot_be_planned(capsys, arguments, message):
    assert main(["plan", *arguments.split()]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_time_that_is_no_number(capsys):
    with pytest.raises(SystemExit):
        main("plan --pipeline zb1p --ranks 4 --microbatches 8 --forward fast".split())
    assert "'fast' is not a number" in capsys.readouterr().err

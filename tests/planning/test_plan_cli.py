"""`dsv3 plan` as it is called: what it prints, and one clear error for what cannot be."""

import pytest

from dsv3_jax import cli
from dsv3_jax.planning import search

TINY = "--config=configs/tiny.py"
V3 = "--config=configs/v3_671b.py"


def test_budget(capsys):
    assert cli.main(["plan", "--budget=1e23", "--flops-per-device=1.25e14", "--days=30"]) == 0
    assert "309 for 30 days" in capsys.readouterr().out


def test_the_published_run_of_v3(capsys):
    """2.664M H800-hours within 15%, from the MFU that DeepSeek reports of the same cluster.

    38.94% of the bf16 peak, causal attention counted, on 2,048 H800 (arXiv 2505.09343, table 4), and 14.8T
    tokens; FLOPs come from the configuration. The published hours are used nowhere else.
    """
    # Without a pipeline 15,360 sequences do not divide over 2,048 devices; the tokens of the run stay.
    train = {"batch_size": 16384, "micro_batch_size": 2048, "ramp_start_batch": 4096}
    changes = [f"--config.train.{name}={value}" for name, value in train.items()]
    assert cli.main(["plan", V3, "--topology=h800:256x8", "--mfu=0.3894", *changes]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "at the MFU given" in line]
    words = line.replace(",", "").split()
    hours, dollars = float(words[words.index("device-hours") - 1]), float(words[-2])
    assert hours == pytest.approx(2.664e6, rel=0.15)
    assert dollars == pytest.approx(2 * hours, rel=1e-6)  # The report's $2 an hour.


def test_search(capsys, monkeypatch):
    """On two GPUs: the fastest is first. Each policy traces the model twice, so two of them."""
    monkeypatch.setattr(search, "REMAT", ("v3", "full"))
    assert cli.main(["plan", TINY, "--topology=h200:2", "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    steps = [float(line.split()[1]) for line in lines]
    assert len(steps) == 10 and steps == sorted(steps)
    assert any("expert=2" in line for line in lines) and any("data=2" in line for line in lines)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([TINY, "--topology=v5q:4"], "no chip 'v5q'"),
        (["--topology=h200:2"], "--topology needs --config=FILE"),
        (["--config=configs/none.py", "--topology=h200:2"], "no such file; there are configs/"),
        (
            [TINY, "--topology=h200:8", "--config.mesh.data=4", "--config.mesh.expert=4"],
            "does not fit 8 devices",
        ),
        ([TINY, "--topology=h200:8"], "8 devices, and the mesh takes 1: set mesh.data=-1"),
        ([TINY, "--topology=h200:1", "--config.train.stepz=3"], "did you mean train.steps"),
        ([TINY, "--topology=h200:7", "--config.mesh.data=-1"], "must divide over data x expert"),
        ([TINY, "--topology=h200:7", "--search"], "none divides the batch"),
        ([TINY, "--topology=h200:1", "--mfu=0"], "mfu = 0"),
        (["--budget=-1"], "budget = -1: must be above 0"),
        (["--pipeline=1f1b"], "needs --ranks and --microbatches"),
    ],
)
def test_one_clear_error(argv, message, capsys):
    assert cli.main(["plan", *argv]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--budget=1e23", "--bugdet=1"])
    assert stopped.value.code == 2 and "--bugdet=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # Only `plan` takes overrides.
        cli.main(["inspect", TINY, "--config.train.steps=1"])

"""The memory of a rank that is planned, beside what two H200s took, and beside sums over the parameters."""

import json
import math
from pathlib import Path

import jax
import pytest

from dsv3_jax.cli import main
from dsv3_jax.cli._shared import load_config
from dsv3_jax.config_checks import typed
from dsv3_jax.config_reading import override
from dsv3_jax.pipeline import ScheduleError
from dsv3_jax.planning import stages
from dsv3_jax.planning.shapes import parameter_shapes

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks/results/pipeline_gpu_2026-11-22.json"


def config(file, **fields):
    tree = load_config(ROOT / "configs" / file)
    return typed(tree, override(tree, [f"{name}={value!r}" for name, value in fields.items()]), lambda _: [])


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe"])
def test_within_a_tenth_of_what_two_gpus_took(name):
    fields = {"model.n_layers": 4, "model.moe.n_dense_layers": 0, "train.remat": "none"}
    of = config("small_gpu.py", **fields, **{"train.micro_batch_size": 2})
    found = stages.planned(of, name, 2, 8, 2)
    measured = json.loads(MEASURED.read_text())[name]["peak_gib"] * 2**30
    assert abs(found.total / measured - 1) < 0.1


def test_what_is_kept_is_counted():
    fields = {"model.mtp.depth": 0, "model.n_layers": 4, "train.micro_batch_size": 2}
    of = config("tiny.py", **fields)
    shapes = parameter_shapes(of)
    size = {name: 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    layers = size["dense_layers"] + size["moe_layers"]
    rest = sum(size.values()) - layers
    found = stages.planned(of, "dualpipe", 2, 8, 2)
    # A parameter and two moments, each split over both ranks but for a few vectors.
    assert found.state == pytest.approx(3 * (layers + rest) / 2, rel=0.01)
    # Both ranks hold both stages, a dense layer and three MoE layers in 2 x 2 places of MoE and 2 of dense.
    places = 2 * size["dense_layers"] + 4 / 3 * size["moe_layers"]
    assert found.stages == found.gradients == pytest.approx(places + rest, rel=0.01)
    assert found.added == pytest.approx(places / 2 + rest, rel=0.01)
    # 2 + 1 slots for inputs, 1 + 1 for gradients (`place`), of 2 x 256 x 128 float32.
    assert found.slots == 5 * 2 * 256 * 128 * 4
    # One layer's residuals at a time, of the two in a stage, and the layers' inputs.
    less = stages.planned(config("tiny.py", **fields, **{"train.remat": "full"}), "dualpipe", 2, 8, 2)
    assert 0.5 * found.residuals < less.residuals < 0.8 * found.residuals
    with pytest.raises(ScheduleError, match="4 layers in 16 stages"):
        stages.planned(of, "dualpipev", 8, 16, 2)


def test_plan_prints_it(capsys):
    command = "plan --pipeline 1f1b --ranks 2 --microbatches 8 --no-chart --config.model.mtp.depth=0".split()
    assert main([*command, f"--config={ROOT / 'configs/tiny.py'}"]) == 0
    out = capsys.readouterr().out
    assert "memory of a rank at the peak of a step, GPU" in out and "sums of their gradients" in out
    # The batch of 8 in 8 micro-batches of one sequence, for which two replicas are one too many.
    assert main([*command, f"--config={ROOT / 'configs/tiny.py'}", "--config.mesh.data=2"]) == 2
    assert "train.micro_batch_size = 1: 2 devices" in capsys.readouterr().err

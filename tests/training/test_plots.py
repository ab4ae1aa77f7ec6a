"""Pictures: what they show is compared to the data, as drawn on the axes; the file is a readable PNG."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dsv3_jax.training import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_loss_curve_shows_training_validation_and_bigram(tmp_path, drawn):
    records = [{"step": s, "ce_loss": 5.0 - 0.01 * s, "tokens": 8192 * s} for s in range(10, 310, 10)]
    records[4]["ce_loss"] = None  # A step that was not finite.
    records[9]["validation_loss"], records[29]["validation_loss"] = 4.2, 2.125
    plots.loss_curve(records, tmp_path / "loss.png", bigram_loss=2.48)

    (axes,) = drawn[0].axes
    training, validation, bigram = axes.lines
    kept = [r for r in records if r["ce_loss"] is not None]
    np.testing.assert_array_equal(training.get_xydata(), [(r["step"], r["ce_loss"]) for r in kept])
    np.testing.assert_array_equal(validation.get_xydata(), [(100, 4.2), (300, 2.125)])
    assert list(bigram.get_ydata()) == [2.48, 2.48]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "validation (2.125)", "bigram model (2.480)"]
    assert axes.get_title() == "Loss over 2.46M tokens"
    assert axes.get_ylabel() == "cross-entropy (nats a token)" and axes.get_xlabel() == "optimizer step"
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (600, 960) and pixels.std() > 0.05  # Not blank.


def test_a_run_without_records_still_draws(tmp_path, drawn):
    plots.loss_curve([], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (600, 960)


@pytest.mark.parametrize(("rows", "experts"), [(1, 8), (4, 16), (59, 256)])
def test_expert_load_is_relative_to_the_layers_mean(tmp_path, drawn, rows, experts):
    counts = np.random.default_rng(0).integers(0, 100, (rows, experts))
    names = [f"layer {i}" for i in range(rows)]
    plots.expert_load(counts, tmp_path / "load.png", names)

    axes, bar = drawn[0].axes
    load = counts / counts.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(axes.images[0].get_array(), load, rtol=1e-12)
    # One number a cell where there is room for them, none where there is not.
    texts = [text.get_text() for text in axes.texts]
    assert texts == ([f"{value:.2f}" for value in load.ravel()] if experts <= 16 else [])
    assert axes.get_title() == f"Expert load, worst MaxVio {(load.max(axis=1) - 1).max():.2f}"
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(shown) <= 30 and set(shown) <= set(names) and shown[0] == "layer 0"
    assert bar.get_ylabel() == "load / mean load of the layer"
    # Balanced is the middle of the colours, whatever the extremes.
    assert axes.images[0].norm(1.0) == 0.5
    # Row names are inside the picture and apart from each other.
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert all(not a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


def test_a_layer_without_tokens_is_drawn_empty(tmp_path, drawn):
    plots.expert_load(np.array([[0, 0], [3, 1]]), tmp_path / "load.png")
    np.testing.assert_allclose(drawn[0].axes[0].images[0].get_array(), [[0, 0], [1.5, 0.5]])


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, dsv3_jax.training.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

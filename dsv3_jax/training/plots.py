"""Pictures at the end of a run: the loss curve, and the load of every expert.

Matplotlib is imported when the first picture is drawn: it takes most of a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond this many experts the numbers in the cells would not be readable.
MAX_LABELLED_EXPERTS = 16


def loss_curve(
    records: Sequence[Mapping[str, Any]], path: str | Path, bigram_loss: float | None = None
) -> None:
    """Draws training and validation loss over steps, and a bigram model's loss as a horizontal line.

    Args:
      records: lines of `metrics.jsonl`: "step" and "ce_loss" (the main model's cross-entropy, which a
        bigram model can be compared to), "validation_loss" where there was an evaluation, "tokens".
      path: the PNG to write.
      bigram_loss: nats a token on the validation data; None draws no line.
    """
    figure = _figure(8.0, 5.0)
    axes = figure.subplots()
    steps, losses = _series(records, "ce_loss")
    axes.plot(steps, losses, color="tab:blue", linewidth=1.2, label="training")
    steps, losses = _series(records, "validation_loss")
    if len(steps):
        axes.plot(
            steps, losses, "o-", color="tab:orange", markersize=4, label=f"validation ({losses[-1]:.3f})"
        )
    if bigram_loss is not None:
        axes.axhline(bigram_loss, color="tab:gray", linestyle="--", label=f"bigram model ({bigram_loss:.3f})")
    tokens = max((record.get("tokens", 0) for record in records), default=0)
    axes.set_title("Loss" + (f" over {_count(tokens)} tokens" if tokens else ""))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def expert_load(counts: np.ndarray, path: str | Path, rows: Sequence[str] | None = None) -> None:
    """Draws the load of every expert relative to the mean of its layer, as a heatmap; 1 is balanced.

    Args:
      counts: tokens routed to each expert, [rows, experts]; a row a MoE layer or MTP depth.
      path: the PNG to write.
      rows: a name a row; None counts them from 0.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    counts = np.asarray(counts, np.float64)
    mean = counts.mean(axis=1, keepdims=True)
    load = np.divide(counts, mean, out=np.zeros_like(counts), where=mean > 0)
    n_rows, n_experts = load.shape
    figure = _figure(10.0, min(max(2.0 + 0.3 * n_rows, 3.0), 10.0))
    axes = figure.subplots()
    # White is balanced, blue starved, red overloaded; twice the mean is always full red or paler.
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(load.max(initial=0.0))))
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    if n_experts <= MAX_LABELLED_EXPERTS:
        for row, column in np.ndindex(load.shape):
            dark = abs(float(norm(load[row, column])) - 0.5) > 0.35
            text = f"{load[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    names = list(rows) if rows is not None else [str(row) for row in range(n_rows)]
    # At most about thirty names fit the tallest picture.
    shown = range(0, n_rows, -(-n_rows // 30))
    axes.set_yticks(list(shown), [names[row] for row in shown])
    max_violation = float((load.max(axis=1, initial=1.0) - 1.0).max(initial=0.0))
    axes.set_title(f"Expert load, worst MaxVio {max_violation:.2f}")
    axes.set_xlabel("expert")
    if rows is None:
        axes.set_ylabel("MoE layer")
    figure.colorbar(image, ax=axes, label="load / mean load of the layer")
    _save(figure, path)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that hold a finite value of `name` (null: it was not finite)."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _figure(width: float, height: float) -> "Figure":
    # Not through pyplot: no window system is looked for, and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> None:
    figure.savefig(path)


def _count(number: int) -> str:
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)

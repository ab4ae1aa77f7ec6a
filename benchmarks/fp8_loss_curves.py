"""Losses of a comparison: smoothed, their gaps to bf16, and the picture of both."""

import numpy as np

SHARED = "shared"
LABELS = {"again": "bf16 again (noise)", SHARED: "bf16, shared start", "tensor": "fp8, a scale a tensor"}
LABELS["coarse"] = "fp8, a scale a tensor, no promotion"
WINDOW = 50
CLAIM = 0.25  # Percent: DeepSeek-V3, arXiv 2412.19437, section 3.3.


def smoothed(losses):
    """Means over the last `WINDOW` steps, from the first whole window on."""
    total = np.cumsum([0.0, *losses])
    return (total[WINDOW:] - total[:-WINDOW]) / WINDOW


def curves(runs: dict) -> dict:
    """The smoothed loss of each variant that has a whole window."""
    losses = {name: [row[0] for row in run["losses"]] for name, run in runs.items()}
    return {name: smoothed(of) for name, of in losses.items() if len(of) >= WINDOW}


def gap(curve, reference):
    """Percent by which a smoothed loss is above another, as far as both go."""
    both = min(len(curve), len(reference))
    return 100 * (curve[:both] / reference[:both] - 1)


def compare(runs: dict) -> dict:
    """Steps, speed and last loss of each variant; its gaps to bf16 in percent, by quarters of its steps."""
    summary: dict = {"window": WINDOW}
    found = curves(runs)
    for name, curve in found.items():
        run = runs[name]
        summary[name] = {"steps": len(run["losses"]), "last_loss": float(curve[-1])}
        summary[name]["last_max_vio"] = run["losses"][-1][1]
        summary[name]["milliseconds_a_step"] = 1e3 * run["seconds"] / len(run["losses"])
        if "bf16" in found and name not in ("bf16", SHARED):
            gaps = gap(curve, found["bf16"])
            quarters = np.array_split(gaps, 4)
            summary[name] |= {
                "last_gap": float(gaps[-1]),
                "largest_gap_by_quarter": [float(abs(q).max()) for q in quarters],
                "mean_gap_by_quarter": [float(q.mean()) for q in quarters],
                "windows_within_claim": float((abs(gaps) <= CLAIM).mean()),
            }
    return summary


def plot(runs: dict, path: str) -> None:
    """The smoothed losses, and the relative gaps to bf16 below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(runs)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    for name, curve in found.items():
        steps = np.arange(len(curve)) + WINDOW + runs[name].get("first", 0)
        (line,) = above.plot(steps, curve, label=LABELS.get(name, name))
        if "bf16" in found and name not in ("bf16", SHARED):
            gaps = gap(curve, found["bf16"])
            below.plot(steps[: len(gaps)], gaps, color=line.get_color())
    above.set_ylabel("loss, nats a token")
    below.set_ylabel("gap to bf16, %")
    below.set_xlabel(f"step (means over {WINDOW})")
    below.axhspan(-CLAIM, CLAIM, alpha=0.15)
    above.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)

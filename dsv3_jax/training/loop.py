"""What the loop does around the step: batches onto the mesh, evaluation, a row of metrics, the end."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.config_reading import ConfigError, Problem
from dsv3_jax.data import Loader, Tokenizer, bigram_cross_entropy
from dsv3_jax.parallel import distributed
from dsv3_jax.training import ema, ema_beside, plots, schedules
from dsv3_jax.training.report import METRICS_FILE, NoReport, Report, read_metrics
from dsv3_jax.training.sample import sample_text
from dsv3_jax.training.state import TrainState, make_model
from dsv3_jax.training.step import Metrics, Schedules, batch_sharding, make_eval_step, make_train_step
from dsv3_jax.training.throughput import flops_per_token, peak_flops


def micro_batch_size(config: Config) -> int:
    """Sequences in one forward pass, over all devices."""
    return config.train.micro_batch_size or config.train.batch_size


def data_share(mesh: Mesh) -> dict[str, int]:
    """Which part of every batch this process reads, as the `process_index` and `process_count` of a `Loader`.

    Processes whose devices hold the same rows, as pipeline stages do, read the same.

    Raises:
      ConfigError: the mesh leaves processes without devices, or gives some more of the batch than others.
    """
    whole = (1, mesh.size, 1)
    rows: dict[int, set[int]] = {}
    for device, (_, span, _) in batch_sharding(mesh).devices_indices_map(whole).items():
        rows.setdefault(device.process_index, set()).update(range(*span.indices(mesh.size)))
    shares = sorted({tuple(sorted(mine)) for mine in rows.values()})
    even = len({len(share) for share in shares}) == 1 and sum(map(len, shares)) == mesh.size
    if not even or len(rows) < jax.process_count():
        fix = (
            f"does not give each of {jax.process_count()} processes, with {jax.device_count()} devices in "
            "all, an equal part of the batch; for example data=-1, expert=1"
        )
        raise ConfigError([Problem("mesh", dict(mesh.shape), fix)])
    mine = tuple(sorted(rows[jax.process_index()]))
    return {"process_index": shares.index(mine), "process_count": len(shares)}


def put_batch(
    config: Config, mesh: Mesh, rows: dict[str, np.ndarray], sequences: int
) -> tuple[dict[str, jax.Array], np.int32]:
    """This process's rows as global arrays [micro-batches, micro-batch, seq], and how many of them count.

    During a batch-size ramp the array has room for the largest batch, so that the step compiles once.
    """
    micro = micro_batch_size(config)
    count = sequences // micro
    slots = config.train.batch_size // micro if config.train.ramp_start_batch else count
    share = micro * len(rows["tokens"]) // sequences  # Rows of a micro-batch that this process holds.
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shaped = x.reshape(count, share, *x.shape[1:])
        padded = np.pad(shaped, ((0, slots - count), (0, 0), (0, 0)))
        return jax.make_array_from_process_local_data(sharding, padded)

    return {name: put(x) for name, x in rows.items()}, np.int32(count)


def schedules_at(config: Config, step: int, tokens: int) -> Schedules:
    """The values of all schedules for the step that follows `step` steps and `tokens` tokens."""
    values = (
        schedules.learning_rate(config, step, tokens),
        schedules.bias_speed(config, tokens),
        schedules.mtp_weight(config, tokens),
    )
    # Scalars of one dtype whatever the values, so that the step compiles once.
    return Schedules(*(jnp.float32(value) for value in values))


class Steps:
    """Training steps, with the moving average of the parameters if there is one.

    They replace what `state` holds: "train", a `TrainState`, and "ema". Where the average is updated beside
    the next step, "ema" is missing until `catch_up`.
    """

    def __init__(self, config: Config, mesh: Mesh, params: Any, layout: Any) -> None:
        """`params`: the shapes of the parameters; `layout`: the shardings of their average."""
        self._averages = config.train.ema_decay > 0
        beside = ema_beside.applies(config, mesh)
        self._step = distributed.together(make_train_step(config, mesh, average=beside))
        self._update = ema.make_update(config.train.ema_decay, layout)
        self._keeper = ema_beside.Keeper(params, layout) if beside else None
        self._late: Any = None  # The average without the last step, and whether that changed the parameters.

    def __call__(self, state: dict[str, Any], batch: Any, n_micro: Any, rates: Schedules) -> Metrics:
        """One step; the arguments after `state` are those of `make_train_step`."""
        given = state["train"], batch, n_micro, rates
        if self._keeper:
            average, changed = self._late or (self._keeper.apart(state.pop("ema")), np.bool_(False))
            state["train"], metrics, average = self._step(*given, average, changed)
            self._late = average, metrics.finite
            return metrics
        state["train"], metrics = self._step(*given)
        if self._averages:
            state["ema"] = self._update(state["ema"], state["train"].params, metrics.finite)
        return metrics

    def catch_up(self, state: dict[str, Any]) -> None:
        """Makes `state["ema"]` the average that includes the last step."""
        if self._keeper and self._late:
            average, changed = self._late
            state["ema"] = self._update(self._keeper.whole(average), state["train"].params, changed)
            self._late = None


def make_evaluation(
    config: Config, mesh: Mesh, process: dict[str, int]
) -> Callable[..., tuple[float, np.ndarray]]:
    """`evaluate(params, router) -> (nats a token, expert counts [rows, experts])` on held-out text.

    The same sequences every time. The data is opened and the step compiled by the first call.
    """
    micro = micro_batch_size(config)
    step = distributed.together(make_eval_step(config, mesh))
    loaders: list[Loader] = []

    def evaluate(params: Any, router: Any) -> tuple[float, np.ndarray]:
        if not loaders:
            train = config.train
            loaders.append(
                Loader(config.data, split="validation", seq_len=train.seq_len, seed=train.seed, **process)
            )
        loaders[0].seek(0)
        total, counts = np.zeros(2), 0
        for _ in range(config.train.eval_batches):
            # Never padded: the ramp is the training step's.
            rows = loaders[0].take(micro)
            sharding = batch_sharding(mesh)
            batch = {k: jax.make_array_from_process_local_data(sharding, x[None]) for k, x in rows.items()}
            sums, load = step(params, router, batch)
            total += np.asarray(sums, np.float64)
            counts = counts + np.asarray(load, np.int64)
        return float(total[0] / max(total[1], 1)), np.asarray(counts)

    return evaluate


def metrics_row(
    config: Config,
    metrics: Metrics,
    rates: Schedules,
    params: Any,
    speed: float,
    devices: list[Any],
) -> dict[str, Any]:
    """What `metrics.jsonl` says of a step, besides its number and tokens."""
    metrics = jax.device_get(metrics)
    parts = metrics.losses
    by_layer = np.asarray(metrics.max_vio, np.float64)
    row = {
        "loss": parts.loss,
        "ce_loss": parts.ce_loss,
        "mtp_loss": parts.mtp_loss,
        "balance_loss": parts.balance_loss,
        "max_vio": float(by_layer.mean()) if by_layer.size else 0.0,
        "max_vio_by_layer": by_layer,
        "grad_norm": metrics.grad_norm,
        "learning_rate": rates.learning_rate,
        "tokens_per_second": speed,
    }
    peak = peak_flops(devices)
    if peak is not None:
        row["mfu"] = speed * flops_per_token(config, params) / peak
    memory = devices[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        row["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return row


def row_names(config: Config) -> list[str]:
    """A name for each row of expert counts: the MoE layers by number, then the prediction depths."""
    model = config.model
    names = [f"layer {i}" for i in range(model.moe.n_dense_layers, model.n_layers)]
    return names + ([f"MTP {k}" for k in range(1, model.mtp.depth + 1)] if names else [])


def _held_here(tree: Any) -> Any:
    """The tree as arrays of this process alone, None if it holds only parts of some."""
    leaves, structure = jax.tree.flatten(tree)
    if not all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return None
    here = [leaf if leaf.is_fully_addressable else leaf.addressable_data(0) for leaf in leaves]
    return jax.tree.unflatten(structure, here)


def finish(
    config: Config,
    state: TrainState,
    validation: tuple[float, np.ndarray],
    workdir: Path,
    report: Report | NoReport,
    tokenizer: Tokenizer,
) -> None:
    """The end of a run: loss curve and expert loads as PNG, the bigram's loss beside ours, a text sample."""
    evaluated = config.train.eval_batches * micro_batch_size(config)
    bigram = bigram_cross_entropy(config.data, seq_len=config.train.seq_len, n_sequences=evaluated)
    loss, counts = validation
    bits = f" (bits a byte: {loss / math.log(2):.3f})" if config.data.tokenizer == "byte" else ""
    report.note(
        f"validation loss {loss:.4f} nats a token{bits}; a bigram model of the same text: {bigram:.4f}"
    )
    plots.loss_curve(read_metrics(workdir / METRICS_FILE), workdir / "loss.png", bigram)
    written = ["loss.png"]
    if len(counts):
        plots.expert_load(counts, workdir / "expert_load.png", row_names(config)[: len(counts)])
        written.append("expert_load.png")
    variables = _held_here({"params": state.params, "router": state.router})
    if config.train.sample_tokens and variables is None:
        report.note("no text sample: this process holds a part of the model; `dsv3 generate` reads all of it")
    elif config.train.sample_tokens:
        wanted = (config.train.sample_prompt, config.train.sample_tokens)
        text = sample_text(make_model(config), variables, tokenizer, *wanted, seed=config.train.seed)
        (workdir / "sample.txt").write_text(text, encoding="utf-8")
        written.append("sample.txt")
        report.note(f"--- sample ---\n{text}\n--------------")
    report.note(f"in {workdir}: {METRICS_FILE}, tensorboard, {', '.join(written)}")

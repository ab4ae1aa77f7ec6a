"""Plans as text."""

from dsv3_jax.config import Config
from dsv3_jax.planning import compiled, cost, flops, laws, search, traffic
from dsv3_jax.planning.hardware import GIB, PRICES_AS_OF, PlanError, Topology
from dsv3_jax.planning.shapes import Split, parameter_shapes, split_of


def plan(
    config: Config, topology: Topology, *, mfu: float | None, price: float | None, compile_: bool
) -> list[str]:
    """The lines of `dsv3 plan --config --topology`; on TPUs the step is compiled too."""
    split = split_of(config, topology)
    candidate = search.evaluate(config, split, topology)
    program = (
        compiled.compile_step(config, topology) if compile_ and topology.chip.platform == "tpu" else None
    )
    lines = [f"{topology.text}: {topology.n_devices} {topology.chip.name}, {candidate.label}", ""]
    lines += _memory(candidate, topology, program)
    lines += ["", *_work(candidate, topology)]
    lines += ["", *_links(config, split, topology)]
    lines += ["", *_times(candidate)]
    return [*lines, "", *_run(candidate, topology, mfu, price)]


def _memory(candidate: search.Candidate, topology: Topology, program: compiled.Compiled | None) -> list[str]:
    used, room = candidate.used, topology.chip.hbm
    lines = ["HBM a device, GiB" + (" (analytical)" if program else "")]
    lines += [f"  {kind:<24}{size / GIB:>10.3f}" for kind, size in used._asdict().items()]
    fits = "fits" if used.total <= room else "DOES NOT FIT"
    lines.append(f"  {'peak':<24}{used.total / GIB:>10.3f}   of {room / GIB:.2f}: {fits}")
    if program:
        lines += [
            f"HBM a device by the compiler, GiB ({program.seconds:.0f} s to trace and compile)",
            f"  {'state and batch':<24}{program.state / GIB:>10.3f}",
            f"  {'inside the step':<24}{program.temporaries / GIB:>10.3f}",
            f"  {'peak':<24}{program.peak / GIB:>10.3f}   analytical {used.total / program.peak - 1:+.1%}",
        ]
        counts = compiled.collectives(program.text)
        lines.append("  collectives in its text   " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return lines


def _work(candidate: search.Candidate, topology: Topology) -> list[str]:
    config = candidate.config
    counted = flops.of_training(config, parameter_shapes(config), topology.chip.platform)
    tokens = config.train.batch_size * config.train.seq_len
    lines = [
        f"{'FLOPs':<26}{'a token':>12}{'a step':>12}",
        f"  {'model':<24}{counted.model:>12.4g}{counted.model * tokens:>12.4g}",
        f"  {'hardware':<24}{counted.hardware:>12.4g}{counted.hardware * tokens:>12.4g}",
    ]
    if counted.fp8:
        lines.append(f"  {'of that in FP8':<24}{counted.fp8:>12.4g}{counted.fp8 * tokens:>12.4g}")
    return lines


def _links(config: Config, split: Split, topology: Topology) -> list[str]:
    near = topology.chip.near_name
    lines = [f"{'bytes a device sends in a step':<40}{'over':<8}{near:>10}{'network':>10}   (GB)"]
    moved = traffic.of_step(config, split, topology)
    lines += [f"  {t.what:<38}{t.axis:<8}{t.near / 1e9:>10.3f}{t.far / 1e9:>10.3f}" for t in moved]
    return lines if moved else ["one device: nothing is sent"]


def _times(candidate: search.Candidate) -> list[str]:
    bound = candidate.bound
    lines = ["seconds a step, each unit alone"]
    lines += [f"  {unit:<24}{seconds:>10.4f}" for unit, seconds in bound.seconds.items()]
    lines.append(f"roofline: {bound.step:.4f} s, limited by {bound.limit}; MFU at most {bound.mfu:.1%}")
    return lines


def _run(
    candidate: search.Candidate, topology: Topology, mfu: float | None, price: float | None
) -> list[str]:
    train, bound, chip = candidate.config.train, candidate.bound, topology.chip
    steps = train.steps * train.batch_size * train.seq_len
    tokens = train.token_budget or steps
    price = chip.price if price is None else price
    per_token = bound.model_flops / (train.batch_size * train.seq_len)
    lines = [f"the run: {tokens:.4g} tokens at ${price:g} a device-hour"]
    rates = [("at the roofline", bound.mfu)] + ([("at the MFU given", mfu)] if mfu is not None else [])
    for name, rate in rates:
        found = cost.of_run(tokens, per_token, chip.bf16, topology.n_devices, rate, price)
        speed = tokens / found.seconds / topology.n_devices
        lines.append(
            f"  {name:<18}MFU {rate:>6.1%}{speed:>10,.0f} tokens/s a device{found.days:>10.2f} days"
            f"{found.device_hours:>14,.0f} device-hours{found.dollars:>14,.0f} $"
        )
    if mfu is not None and mfu > bound.mfu:
        lines.append(f"  this mesh cannot reach {mfu:.1%}: {bound.limit} limits it; --search tries others")
    if price == chip.price:
        lines.append(f"  prices: {PRICES_AS_OF}; --price sets another")
    return lines


def ranking(config: Config, topology: Topology, compile_: bool) -> list[str]:
    """The lines of `--search`; on TPUs the best is compiled.

    Raises:
      PlanError: nothing fits.
    """
    best, tried = search.search(config, topology)
    if not best:
        raise PlanError(
            f"topology = {topology.text!r}: none of {tried} meshes, ZeRO modes, remat policies and "
            "micro-batches fits its memory, or none divides the batch: more devices, larger ones, or another "
            f"train.batch_size (now {config.train.batch_size}; {topology.n_devices} devices)"
        )
    lines = [
        f"{topology.text}: {tried} tried; the fastest that fit {search.ROOM:.0%} of HBM",
        f"{'':4}{'step s':>9}{'MFU at most':>13}{'limit':>9}{'GiB':>8}   settings",
    ]
    for place, c in enumerate(best, 1):
        bound = c.bound
        lines.append(
            f"{place:>3} {bound.step:>9.3f}{bound.mfu:>13.1%}{bound.limit:>9}{c.used.total / GIB:>8.2f}"
            f"   {c.label}"
        )
    if compile_ and topology.chip.platform == "tpu":
        program = compiled.compile_step(best[0].config, topology)
        lines.append(
            f"the first, compiled in {program.seconds:.0f} s: {program.peak / GIB:.2f} GiB by the compiler, "
            f"analytical {best[0].used.total / program.peak - 1:+.1%}"
        )
    return lines


def budget(compute: float, flops_per_device: float | None, days: float) -> list[str]:
    """The lines of `dsv3 plan --budget`."""
    found = laws.spend(compute)
    layers, width = laws.dense_shape(found.flops_per_token)
    lines = [
        f"{compute:.4g} FLOPs, by the scaling laws of DeepSeek LLM (arXiv 2401.02954, section 3)",
        f"  model          {found.flops_per_token:.4g} FLOPs a token without the embedding: as a dense model "
        f"of {layers} layers of width {width}",
        f"  data           {found.tokens:.4g} tokens",
        f"  learning rate  {found.learning_rate:.3e}",
        f"  batch          {found.batch:.4g} tokens: {found.batch / 4096:,.0f} sequences of 4096",
    ]
    if flops_per_device is not None:
        need = laws.machines(compute, flops_per_device, days)
        lines.append(
            f"  devices        {need.devices:,} for {need.days:g} days at {flops_per_device:.4g} FLOP/s each "
            f"({need.device_seconds:.4g} device-seconds, {need.device_seconds / 3600:,.0f} device-hours)"
        )
    return lines

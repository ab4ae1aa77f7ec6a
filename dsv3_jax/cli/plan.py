"""`dsv3 plan`: what a run takes before any machine is rented, or a pipeline schedule."""

import argparse
import shutil
from fractions import Fraction
from pathlib import Path


def add_parser(subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="what a run takes before any machine is rented: memory, time, money; or a pipeline schedule",
        description="With --config and --topology: HBM by kind, FLOPs, traffic, a roofline and a cost; "
        "for TPUs the training step is compiled ahead of time. With --budget: the scaling laws. "
        "With --pipeline: a schedule simulated.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="v5p:16x16x16 or v6e:16x16 (chips), h100:256x8 (nodes x GPUs), h200:2",
    )
    what.add_argument("--budget", type=float, metavar="FLOPS", help="compute to spend, for example 1e23")
    what.add_argument(
        "--pipeline", metavar="NAME", help="gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev"
    )
    _run_arguments(parser.add_argument_group("with --topology"))
    budget = parser.add_argument_group("with --budget")
    budget.add_argument("--flops-per-device", type=float, metavar="F", help="FLOP/s that a device reaches")
    budget.add_argument("--days", type=float, default=30.0, metavar="N", help="default: 30")
    _pipeline_arguments(parser)
    parser.set_defaults(run=run, overrides=[])


def _run_arguments(group) -> None:
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="of configs/; --config.FIELD=VALUE sets. With --pipeline: the memory of a rank, too",
    )
    group.add_argument("--search", action="store_true", help="try meshes, ZeRO, remat and micro-batches")
    group.add_argument("--no-compile", action="store_true", help="TPUs: the analytical model alone")
    group.add_argument("--mfu", type=float, metavar="M", help="the part of the bf16 peak that a run reaches")
    group.add_argument("--price", type=float, metavar="USD", help="a device-hour")


def _pipeline_arguments(parser) -> None:
    group = parser.add_argument_group(
        "with --pipeline",
        "Times are of one micro-batch on a rank's share of the model, layers / ranks, in any unit; "
        "where it is cut finer a stage takes proportionally less.",
    )
    group.add_argument("--ranks", type=int, metavar="N")
    group.add_argument("--microbatches", type=int, metavar="M", help="a step, in all directions")
    group.add_argument(
        "--chunks", type=int, default=2, metavar="C", help="stages a rank of interleaved; default: 2"
    )
    group.add_argument("--layers", type=int, metavar="L", help="of the model; uneven stages then count")
    group.add_argument("--forward", type=_time, default=Fraction(1), metavar="T", help="default: 1")
    group.add_argument(
        "--backward", type=_time, default=Fraction(2), metavar="T", help="the whole of it; default: 2"
    )
    group.add_argument(
        "--weight", type=_time, default=Fraction(1), metavar="T", help="its part for the weights; default: 1"
    )
    group.add_argument("--overlapped", type=_time, metavar="T", help="F&B; default: forward + backward")
    group.add_argument(
        "--send", type=_time, default=Fraction(0), metavar="T", help="from rank to rank; default: 0"
    )
    group.add_argument("--png", type=Path, metavar="FILE", help="write the chart as a picture")
    group.add_argument("--no-chart", action="store_true", help="numbers only")


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Returns the exit code."""
    from dsv3_jax.cli import _shared

    if args.pipeline is not None:
        missing = [name for name in ("ranks", "microbatches") if getattr(args, name) is None]
        if missing:
            return _shared.fail(f"dsv3 plan: --pipeline needs --{' and --'.join(missing)}", 2)
        code = _run_pipeline(args)
        return code if code or args.config is None else _run_pipeline_memory(args)
    _shared.on_cpu()
    from dsv3_jax.config_reading import ConfigError
    from dsv3_jax.planning import PlanError, parse_topology, report

    try:
        if args.budget is not None:
            lines = report.budget(args.budget, args.flops_per_device, args.days)
        else:
            topology = parse_topology(args.topology)
            config = _config(args, topology.n_devices)
            compile_ = not args.no_compile
            if args.search:
                lines = report.ranking(config, topology, compile_)
            else:
                lines = report.plan(config, topology, mfu=args.mfu, price=args.price, compile_=compile_)
    except (PlanError, ConfigError) as error:
        return _shared.fail(f"dsv3 plan: {error}", 2)
    print("\n".join(lines))
    return 0


def _config(args: argparse.Namespace, n_devices: int):
    """The typed config, checked; its mesh too, unless a search replaces it."""
    from dsv3_jax import mesh_checks
    from dsv3_jax.cli import _shared
    from dsv3_jax.config_checks import typed
    from dsv3_jax.config_reading import Problem, override
    from dsv3_jax.planning import PlanError

    if args.config is None:
        raise PlanError("--topology needs --config=FILE, for example configs/v3_671b.py")
    tree = _shared.load_config(args.config)
    problems = override(tree, args.overrides)

    def mesh(config):
        return [] if args.search else [Problem(*found) for found in mesh_checks.problems(config, n_devices)]

    return typed(tree, problems, mesh)


def _run_pipeline(args: argparse.Namespace) -> int:
    from dsv3_jax.cli import _shared
    from dsv3_jax.pipeline import NAMES, Durations, ScheduleError, build, chart

    try:
        times = Durations(args.forward, args.backward, args.weight, args.overlapped, args.send)
        schedule = build(args.pipeline, args.ranks, args.microbatches, chunks=args.chunks)
        timeline = _simulate(schedule, times, args.layers)
        print(_summary(timeline, times, args.layers))
        if not args.no_chart:
            print("\n" + chart.text(timeline, shutil.get_terminal_size().columns))
        if args.png:
            chart.png(timeline, args.png)
            print(f"\n{args.png}: written")
    except (ScheduleError, OSError) as error:
        return _shared.fail(f"dsv3 plan: {error}")
    print(f"\n{'':12}{'step':>9}{'bubble':>9}{'idle':>8}{'activations':>13}{'parameters':>12}")
    for name in NAMES:
        try:
            other = build(name, args.ranks, args.microbatches, chunks=args.chunks)
            print(_row(_simulate(other, times, args.layers)))
        except ScheduleError as error:
            print(f"{name:12}{str(error).partition(': ')[2].partition('. Nearest')[0]}")
    print("activations and parameters: of the fullest rank, in shares of layers / ranks of the model")
    return 0


def _run_pipeline_memory(args: argparse.Namespace) -> int:
    """Prints what a rank holds while the configuration's model is trained with this schedule."""
    from dsv3_jax.cli import _shared

    _shared.on_cpu()
    from dsv3_jax.config_checks import typed
    from dsv3_jax.config_reading import ConfigError, override
    from dsv3_jax.pipeline import ScheduleError
    from dsv3_jax.planning import stages

    try:
        tree = _shared.load_config(args.config)
        config = typed(tree, override(tree, args.overrides), lambda _: [])
        found = stages.planned(config, args.pipeline, args.ranks, args.microbatches, args.chunks)
    except (ConfigError, ScheduleError) as error:
        return _shared.fail(f"dsv3 plan: {error}", 2)
    print("\n".join(["", *stages.lines(found)]))
    return 0


def _time(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _simulate(schedule, times, layers):
    """A timeline, with stages as long as their layers."""
    from dsv3_jax.pipeline import simulate, stage_sizes

    sizes = None
    if layers is not None:
        sizes = [
            Fraction(size * schedule.n_stages, layers) for size in stage_sizes(layers, schedule.n_stages)
        ]
    return simulate(schedule, times.scaled(Fraction(schedule.n_ranks, schedule.n_stages)), sizes)


def _summary(timeline, times, layers) -> str:
    from dsv3_jax.pipeline import place, simulator, stage_sizes
    from dsv3_jax.pipeline.checks import check

    schedule = timeline.schedule
    table = place(schedule)
    check(table)
    stage = times.scaled(Fraction(schedule.n_ranks, schedule.n_stages))
    peaks, held = simulator.peak_activations(schedule), simulator.parameters(schedule)
    bubble = f"{float(timeline.bubble):g}"
    if layers is None:
        bubble += f", by the paper's formula {float(simulator.published_bubble(schedule, stage)):g}"
    lines = [
        f"{schedule.name}: {schedule.n_ranks} ranks, {schedule.n_microbatches} micro-batches, "
        f"{schedule.n_stages} stages, {max(held)} a rank",
        f"step         {float(timeline.makespan):g}",
        f"bubble       {bubble}; idle {timeline.bubble_fraction:.1%} of all ranks' time",
        f"activations  {max(peaks)} of a stage on the fullest rank, by the paper "
        f"{simulator.published_activations(schedule)}; by rank {_list(peaks)}",
        f"parameters   {max(held)} of {schedule.n_stages} stages a rank",
        f"table        {len(table.ticks)} ticks, {len(table.sends)} sends; slots by rank: inputs "
        f"{_list(table.n_slots['input'])}, gradients {_list(table.n_slots['gradient'])}; checked",
    ]
    if layers is not None:
        lines.append(f"layers       {_list(stage_sizes(layers, schedule.n_stages))} by stage")
    return "\n".join(lines)


def _row(timeline) -> str:
    from dsv3_jax.pipeline import simulator

    schedule = timeline.schedule
    share = schedule.n_ranks / schedule.n_stages
    activations = max(simulator.peak_activations(schedule)) * share
    held = max(simulator.parameters(schedule)) * share
    return (
        f"{schedule.name:12}{float(timeline.makespan):>9.5g}{float(timeline.bubble):>9.4g}"
        f"{timeline.bubble_fraction:>8.1%}{activations:>13.3g}{held:>12.3g}"
    )


def _list(numbers) -> str:
    return " ".join(map(str, numbers))

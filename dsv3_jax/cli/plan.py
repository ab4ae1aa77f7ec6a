"""`dsv3 plan`: what a pipeline schedule costs, drawn and beside its rivals."""

import argparse
import shutil
from fractions import Fraction
from pathlib import Path


def add_parser(subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="simulate a pipeline schedule: bubble, memory, and a chart",
        description="Simulates a pipeline schedule. Times are of one micro-batch on a rank's share of the "
        "model, layers / ranks, in any unit; where it is cut finer a stage takes proportionally less.",
    )
    parser.add_argument(
        "--pipeline",
        required=True,
        metavar="NAME",
        help="gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev",
    )
    parser.add_argument("--ranks", required=True, type=int, metavar="N")
    parser.add_argument(
        "--microbatches", required=True, type=int, metavar="M", help="a step, in all directions"
    )
    parser.add_argument(
        "--chunks", type=int, default=2, metavar="C", help="stages a rank of interleaved; default: 2"
    )
    parser.add_argument("--layers", type=int, metavar="L", help="of the model; uneven stages then count")
    times = parser.add_argument_group("times")
    times.add_argument("--forward", type=_time, default=Fraction(1), metavar="T", help="default: 1")
    times.add_argument(
        "--backward", type=_time, default=Fraction(2), metavar="T", help="the whole of it; default: 2"
    )
    times.add_argument(
        "--weight", type=_time, default=Fraction(1), metavar="T", help="its part for the weights; default: 1"
    )
    times.add_argument("--overlapped", type=_time, metavar="T", help="F&B; default: forward + backward")
    times.add_argument(
        "--send", type=_time, default=Fraction(0), metavar="T", help="from rank to rank; default: 0"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the chart as a picture")
    parser.add_argument("--no-chart", action="store_true", help="numbers only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Returns the exit code."""
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

"""What a profile of training says of copies to and from the host, and of exchanges between devices."""

import re
from collections import Counter, defaultdict

from benchmarks.profile_events import (
    Event,
    between_starts_and_dones,
    host_copies,
    length,
    merged,
    paths,
    shared,
)

PROFILED = 2  # Steps in a profile.


def beside_copies(found: list[Event], text: str) -> dict:
    """Milliseconds a step of copies between host and device, and what else ran meanwhile."""
    named = host_copies(text)
    spans: dict[str, list] = defaultdict(list)
    kinds, size = Counter(), Counter()
    for event in found:
        way = _way(event, named)
        spans[way].append((event.start, event.end))
        kinds[f"{way}: {re.sub(r'[._]?[0-9]+', '', event.name)[:40]}"] += 1
        if bytes_of := re.search(r"size:(\d+)", event.detail):
            size[way] += int(bytes_of.group(1))
    into, out, work = (merged(spans[way]) for way in ("in", "out", "work"))
    copies, busy = merged(into + out), merged(into + out + work)
    whole = found[-1].start - found[0].start
    a_step = {
        "step": whole,
        "computation": length(work),
        "in": length(into),
        "out": length(out),
        "in and out at once": sum(shared(into, out)),
        "in, under computation": sum(shared(into, work)),
        "out, under computation": sum(shared(out, work)),
        "copies": length(copies),
        "nothing but copies": length(copies) - sum(shared(copies, work)),
        "nothing": whole - length(busy),
    }
    large = Counter({kind: count for kind, count in kinds.items() if not kind.startswith("work")})
    return {
        "ms_a_step": {name: round(ms / PROFILED, 3) for name, ms in a_step.items()},
        "gb_a_step": {way: size[way] / PROFILED / 1e9 for way in ("in", "out")},
        "events": dict(large.most_common(20)),
    }


def _way(event: Event, named: dict[str, str]) -> str:
    """What copies from host memory goes "in", what copies there "out"; all else is "work"."""
    kinds = re.search(r"kind_src:(\w+).*kind_dst:(\w+)", event.detail)
    if kinds and kinds.group(1) != kinds.group(2):
        return "out" if kinds.group(1) == "device" else "in"
    if "H2D" in event.name:
        return "in"
    if "D2H" in event.name:
        return "out"
    return named.get(event.instruction, "work")


SCOPES = (
    "shared_experts",
    "dispatch",
    "combine",
    "expert_gate_up",
    "expert_down",
    "routed_experts",
    "route",
    "attention",
    "dense_ffn",
    "adamw",
)


def label(path: str) -> str:
    """Direction and part of the model, from an `op_name`."""
    direction = "backward" if "transpose(jvp" in path else "forward" if "jvp" in path else "other"
    part = next((scope for scope in SCOPES if re.search(rf"\b{scope}\b", path)), "other")
    return f"{direction} {part}"


def labels_of_collectives(found: list[Event], text: str) -> dict[str, str]:
    """Label and operation of each collective of a profile, as "forward dispatch all-to-all".

    A profile seems to name what an asynchronous start wraps, which the text of a program leaves out. Both are
    taken to be numbered in the same order; where their numbers differ the label is "other".
    """
    path, named = paths(text), {}
    unknown: dict[str, set[str]] = defaultdict(set)
    for event in found:
        match = re.match(r"[a-z-]*[a-z]", event.instruction.replace("_", "-").replace("-start", ""))
        operation = match.group() if match else ""
        if event.instruction in path:
            named[event.instruction] = f"{label(path[event.instruction])} {operation}"
        elif operation:
            unknown[operation].add(event.instruction)
    for operation, names in unknown.items():
        pairs = between_starts_and_dones(text, operation, label)
        known = len(pairs) == len(names)
        ordered = sorted((pair.name for pair in pairs), key=_numbers) if known else sorted(names)
        of = {pair.name: pair.label for pair in pairs}
        for name, start in zip(sorted(names, key=_numbers), ordered, strict=True):
            named[name] = f"{of.get(start, 'other')} {operation}"
    return named


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def beside_exchanges(found: list[Event], text: str) -> dict:
    """Of each device, a step: collectives by kind, and what ran while tokens travelled."""
    path = paths(text)
    named = labels_of_collectives([event for event in found if "nccl" in event.name.lower()], text)
    devices = {}
    for device in sorted({event.device for event in found}):
        mine = [event for event in found if event.device == device]
        travel = [event for event in mine if "nccl" in event.name.lower()]
        work = [event for event in mine if "nccl" not in event.name.lower()]
        busy = merged((event.start, event.end) for event in work)
        kinds: dict[str, list] = defaultdict(list)
        for event in travel:
            kinds[named.get(event.instruction, "other")].append((event.start, event.end))
        collectives = {
            kind: {
                "ms": round(length(merged(spans)) / PROFILED, 3),
                "under computation": round(sum(shared(merged(spans), busy)) / PROFILED, 3),
                "kernels": len(spans) / PROFILED,
            }
            for kind, spans in sorted(kinds.items())
        }
        devices[device] = {
            "step_ms": (mine[-1].start - mine[0].start) / PROFILED,
            "collectives": collectives,
            "beside": {
                kind: _beside(work, spans, path)
                for kind, spans in sorted(kinds.items())
                if kind.endswith("all-to-all")
            },
        }
    return devices


def _beside(work: list[Event], exchange: list, path: dict[str, str]) -> dict:
    """What ran beside an exchange: milliseconds by label, and every instruction of the shared experts."""
    spans, parts = merged(exchange), defaultdict(float)
    instructions: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in work:
        where = path.get(event.instruction, "")
        together = sum(shared([(event.start, event.end)], spans))
        parts[label(where)] += together / PROFILED
        if "shared_experts" in where:
            times = instructions[f"{event.instruction}: {where.split('shared_experts')[-1]}, {label(where)}"]
            times[0] += (event.end - event.start) / PROFILED
            times[1] += together / PROFILED
    return {
        "ms": round(length(spans) / PROFILED, 3),
        "beside": {
            part: round(ms, 3) for part, ms in sorted(parts.items(), key=lambda x: -x[1]) if ms > 0.001
        },
        "shared experts: ms, of them beside": {
            name: [round(ms, 3) for ms in times] for name, times in instructions.items()
        },
    }


def schedule(text: str) -> dict:
    """What the compiler put between the start and the end of each exchange; those without a start wait."""
    pairs = between_starts_and_dones(text, "all-to-all", label)
    path = paths(text)
    # A root is what a start wraps.
    waiting = re.findall(r"^\s+%?(\S+) = (\S+) all-to-all\(", text, re.MULTILINE)
    rounds = re.compile(r"shard_map/while")
    return {
        "between": [
            {"name": pair.name, "of": pair.label, "inside": dict(pair.inside)}
            for pair in pairs
            if not rounds.search(path.get(pair.name, ""))
        ],
        "synchronous": [
            {"name": name, "shape": shape, "of": label(path.get(name, ""))}
            for name, shape in waiting
            if not rounds.search(path.get(name, ""))
        ],
    }

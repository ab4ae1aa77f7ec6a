"""What a profile says a device ran, and what lies beside what; and the same of a compiled program.

`events` reads a profile of `jax.profiler`. `between_starts_and_dones` reads the text of a compiled program.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Span = tuple[float, float]  # Start and end, in milliseconds.


class Event(NamedTuple):
    """An instruction that a device ran; a GPU's kernel, or its like on a CPU."""

    device: int
    start: float  # Milliseconds.
    end: float
    name: str
    instruction: str  # Of the compiled program; "" where the profile does not say.
    detail: str = ""  # Of a copy: the kinds of memory, and bytes.


def events(folder: str | Path) -> list[Event]:
    """All of a profile, in order of time."""
    from jax.profiler import ProfileData

    found = []
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            gpu = re.fullmatch(r"/device:GPU:(\d+)", plane.name)
            if not gpu and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if gpu and not line.name.lower().startswith("stream"):
                    continue
                for event in line.events:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)
                        stats = dict(event.stats)
                    instruction = str(stats.get("hlo_op", ""))
                    if not gpu and not instruction:
                        continue
                    device = int(gpu.group(1)) if gpu else int(stats.get("device_ordinal", 0))
                    start = event.start_ns / 1e6
                    end = start + event.duration_ns / 1e6
                    detail = str(stats.get("memcpy_details", ""))
                    found.append(Event(device, start, end, event.name, instruction, detail))
    return sorted(found, key=lambda event: event.start)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlap, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def shared(first: list[Span], second: list[Span]) -> Iterator[float]:
    """Lengths of what lies in both; each without overlap and in order, as of `merged`."""
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if end > start:
            yield end - start
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1


def length(spans: list[Span]) -> float:
    """The milliseconds that spans without overlap take."""
    return sum(end - start for start, end in spans)


# ---------------------------------------------------------------- compiled programs


def paths(text: str) -> dict[str, str]:
    """The `op_name` of each instruction of a compiled program: JAX's scopes, from the outermost on."""
    found = {}
    for line in text.splitlines():
        match = re.match(r'\s+(?:ROOT )?%?(\S+) = .*?op_name="([^"]*)"', line)
        if match:
            found[match.group(1)] = match.group(2)
    return found


class Between(NamedTuple):
    """An asynchronous operation, and what runs between its start and its end by the compiled schedule."""

    name: str
    label: str
    inside: Counter[str]  # Instructions that compute, by their label.


def between_starts_and_dones(text: str, operation: str, label: Callable[[str], str]) -> list[Between]:
    """Every asynchronous `operation`, as "all-to-all", of a compiled program; `label` takes an `op_name`."""
    pairs, open_starts = [], {}
    for line in text.splitlines():
        if re.match(r"^\S.*\{$", line):
            open_starts = {}
        match = re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line)
        if not match:
            continue
        name, rest = match.groups()
        where = re.search(r'op_name="([^"]*)"', rest)
        path = where.group(1) if where else ""
        if re.search(rf"({operation}|async)-start\(", rest) and operation in name + rest:
            open_starts[name] = Between(name, label(path), Counter())
            continue
        done = re.search(rf"(?:{operation}|async)-done\(.*?%?([\w.-]+)\)", rest)
        if done and done.group(1) in open_starts:
            pairs.append(open_starts.pop(done.group(1)))
        elif re.search(r" (fusion|custom-call|dot|while)\(", rest):
            for pair in open_starts.values():
                pair.inside[label(path)] += 1
    return pairs


def host_copies(text: str) -> dict[str, str]:
    """Of a compiled program: "in" or "out" for every asynchronous copy from or to host memory."""
    found = {}
    for line in text.splitlines():
        head = re.match(r"\s+(?:ROOT )?%?(\S+) = \((.*?\)?), (\S+), u32\[\]\) (\S+)-start\(", line)
        if head and "S(5)" in line:
            name, first, last, operation = head.groups()
            # A copy's target comes first; of all else the operands do.
            source, target = (last, first) if operation == "copy" else (first, last)
            if "S(5)" in source + target:
                found[name] = "out" if "S(5)" in target else "in"
    return found

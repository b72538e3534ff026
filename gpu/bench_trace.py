"""What a profile says took the time: the costs of a trace by name, without TensorBoard."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """An operation of the compiled program.

    Attributes:
        name: of the operation in the compiled program.
        kernel: what ran, where that has another name.
        source: the operation of the model that it was compiled from, where the program tells.
        seconds: over all its runs, without what runs inside it.
        share: of all operations' seconds.
        runs: how often it ran.
    """

    name: str
    kernel: str
    source: str
    seconds: float
    share: float
    runs: int


def read(folder: Path) -> dict[str, Any]:
    """The newest `trace.json.gz` below a folder that `jax.profiler.trace` wrote.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.rglob("*.trace.json.gz"))
    if not found:
        raise ValueError(f"the profiler wrote no trace into {folder}")
    with gzip.open(found[-1], "rt") as file:
        return json.load(file)


def top_costs(
    trace: Mapping[str, Any], sources: Mapping[str, str] | None = None, count: int = 10
) -> list[Cost]:
    """The operations that took the most time, the costliest first.

    On a GPU what its streams ran, else what threads of the host ran of a compiled program.

    Args:
        trace: in the format of Chrome's `about:tracing`, times in microseconds.
        sources: the model's operation for each of the program's, see `sources_of`.
        count: how many.
    """
    sources = sources or {}
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    runs: dict[tuple[str, str], int] = defaultdict(int)
    for event, own in _own_times(_device_events(trace["traceEvents"])):
        name = event.get("args", {}).get("hlo_op", event["name"])
        kernel = "" if event["name"] == name else event["name"]
        seconds[name, kernel] += own / 1e6
        runs[name, kernel] += 1
    total = sum(seconds.values()) or 1.0
    costs = [
        Cost(name, kernel, sources.get(name, ""), spent, spent / total, runs[name, kernel])
        for (name, kernel), spent in seconds.items()
    ]
    return sorted(costs, key=lambda cost: -cost.seconds)[:count]


def _device_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_device = [e for e in spans if processes.get(e["pid"], "").startswith("/device:")]
    if not on_device:
        return [event for event in spans if "hlo_op" in event.get("args", {})]
    of_streams = [
        e for e in on_device if threads.get((e["pid"], e["tid"]), "").startswith("Stream")
    ]
    return of_streams or on_device


def _own_times(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its duration less that of the events inside it, on the same thread."""
    lines = defaultdict(list)
    for event in events:
        lines[event["pid"], event["tid"]].append(event)
    for line in lines.values():
        around: list[list[Any]] = []  # [event, its own time, its end]
        for event in sorted(line, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1][2] <= event["ts"]:
                yield tuple(around.pop()[:2])
            if around:
                around[-1][1] -= event["dur"]
            around.append([event, event["dur"], event["ts"] + event["dur"]])
        yield from (tuple(left[:2]) for left in around)


_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]+)\"", re.M)


def sources_of(dump: Path) -> dict[str, str]:
    """The model's operation for each operation of the programs that `--xla_dump_to` wrote as text."""
    found: dict[str, str] = {}
    for path in sorted(dump.glob("*after_optimizations.txt")):
        found |= dict(_LINE.findall(path.read_text()))
    return {name: shortened(source) for name, source in found.items()}


def shortened(source: str, parts: int = 5) -> str:
    """The last parts of a source, without what only says that it is inside a loop or a remat.

    >>> shortened("jit(step)/transpose(jvp(Decoder))/layers/while/body/checkpoint/mlp/gate/dot_general")
    'transpose(jvp(Decoder))/layers/mlp/gate/dot_general'
    """
    noise = {"while", "body", "checkpoint", "rematted_computation", "closed_call", "cond"}
    kept = [part for part in source.split("/") if part not in noise and part != "jit(step)"]
    return "/".join(kept[-parts:])

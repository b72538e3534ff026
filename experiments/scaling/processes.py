"""Weak and strong scaling over processes of one machine, each held to one core.

    PYTHONPATH=. python experiments/scaling/processes.py --out runs/scaling

Needs two cores and `taskset`. A step's time is the median of those after the first two. Two runs at the same
time that know nothing of one another show what the machine leaves to share.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests import toy

CORES = sorted(os.sched_getaffinity(0))[:2]
METHODS = {
    "LoRA, data": (["--peft.rank=8"], "data"),
    "all weights, fsdp": (["--full"], "fsdp"),
}
STEPS = 6
LENGTHS = (64, 512)


class Run(NamedTuple):
    """One setting: how many processes, the rows of the whole batch, and the tokens of each."""

    method: str
    scaling: str
    length: int
    processes: int
    rows: int


RUNS = [
    Run(method, scaling, length, count, 4 if scaling == "strong" else count)
    for method in METHODS
    for length in LENGTHS
    for scaling in ("weak", "strong", "apart")
    for count in ((2,) if scaling == "apart" else (1, 2, 4))
]


def seconds(run: Run, rows: Path, out: Path) -> list[float]:
    """What each step took."""
    if run.scaling == "apart":
        return apart(run, rows, out)
    commands = commands_of(run, rows, out)
    watch([start(command, out) for command in commands], out)
    return times(out)


def apart(run: Run, rows: Path, out: Path) -> list[float]:
    """The same of single processes that run at the same time, a row a step each."""
    alone = run._replace(scaling="weak", processes=1, rows=1)
    outs = [out / str(number) for number in range(run.processes)]
    running = [start(commands_of(alone, rows, own, core)[0], own) for core, own in enumerate(outs)]
    watch(running, out)
    return [time for own in outs for time in times(own)]


def commands_of(run: Run, rows: Path, out: Path, core: int = 0) -> list[list[str]]:
    """A command for each process; the first is held to `core`, and the others follow by turns."""
    flags, axis = METHODS[run.method]
    flags = [
        *flags,
        f"--mesh.{axis}={run.processes}",
        *(["--mesh.fsdp=1"] if axis != "fsdp" else []),
    ]
    settings = {"model": "smollm2-135m-instruct", "data": rows, "out": out, "steps": STEPS}
    settings |= {"max-length": run.length, "batch-size": run.rows, "dtype": "float32"}
    flags += [f"--{name}={value}" for name, value in settings.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = [
            f"--coordinator=localhost:{free.getsockname()[1]}",
            f"--num-processes={run.processes}",
        ]
    found = []
    for number in range(run.processes):
        who = [*place, f"--process-id={number}"] if run.processes > 1 else []
        command = ["taskset", "-c", str(CORES[(core + number) % len(CORES)]), sys.executable, "-m"]
        found.append([*command, "trainjax.cli", *who, "sft", *flags])
    return found


def start(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Runs it, with its words in a file beside its folder."""
    out.mkdir(parents=True, exist_ok=True)
    number = len(list(out.parent.glob(f"{out.name}-*.log")))
    with (out.parent / f"{out.name}-{number}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def watch(running: list[subprocess.Popen[bytes]], out: Path) -> None:
    """Waits for all; stops where one fails."""
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit(f"a process failed; see {out.parent}/{out.name}*.log")


def times(out: Path) -> list[float]:
    """Seconds of the steps of a run but the first two."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["seconds"] for record in records if "seconds" in record][2:]


def main() -> None:
    """Runs every setting and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = toy.write_jsonl(out / "rows.jsonl", toy.rows(1200))
    found = []
    for number, run in enumerate(RUNS):
        steps = seconds(run, rows, out / str(number))
        found.append(run._asdict() | {"median": statistics.median(steps), "steps": steps})
        print(json.dumps(found[-1]), flush=True)
    (out / "processes.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        "| method | tokens a row | scaling | processes | rows | s a step | rows a second | of ideal |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for entry in found:
        first = "weak" if entry["scaling"] == "apart" else entry["scaling"]
        same = (entry["method"], entry["length"], first)
        alone = next(e for e in found if (e["method"], e["length"], e["scaling"]) == same)
        speed = entry["rows"] / entry["median"]
        cores = min(entry["processes"], len(CORES))
        ideal = speed / (cores * alone["rows"] / alone["median"])
        cells = [entry[name] for name in ("method", "length", "scaling", "processes", "rows")]
        cells += [f"{entry['median']:.2f}", f"{speed:.2f}", f"{ideal:.0%}"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()

"""Weak and strong scaling over processes of one machine, each held to one core.

    PYTHONPATH=. python experiments/scaling/processes.py --out runs/scaling

Needs two cores and `taskset`. A step's time is the median of those after the first two.
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
LENGTH, STEPS = 64, 6


class Run(NamedTuple):
    """One setting: how many processes, and the rows of the whole batch."""

    method: str
    scaling: str
    processes: int
    rows: int


RUNS = [
    Run(method, scaling, count, 4 if scaling == "strong" else count)
    for method in METHODS
    for scaling in ("weak", "strong")
    for count in (1, 2, 4)
]


def seconds(run: Run, rows: Path, out: Path) -> list[float]:
    """What each step took."""
    flags, axis = METHODS[run.method]
    flags = [
        *flags,
        f"--mesh.{axis}={run.processes}",
        *(["--mesh.fsdp=1"] if axis != "fsdp" else []),
    ]
    settings = {"model": "smollm2-135m-instruct", "data": rows, "out": out, "steps": STEPS}
    settings |= {"max-length": LENGTH, "batch-size": run.rows, "dtype": "float32"}
    flags += [f"--{name}={value}" for name, value in settings.items()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = [
            f"--coordinator=localhost:{free.getsockname()[1]}",
            f"--num-processes={run.processes}",
        ]
    out.mkdir(parents=True)
    running = []
    for number in range(run.processes):
        who = [*place, f"--process-id={number}"] if run.processes > 1 else []
        command = ["taskset", "-c", str(CORES[number % len(CORES)]), sys.executable, "-m"]
        command += ["trainjax.cli", *who, "sft", *flags]
        with (out.parent / f"{out.name}-{number}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit(f"a process failed; see {out.parent}/{out.name}-*.log")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["seconds"] for record in records if "seconds" in record]


def main() -> None:
    """Runs every setting and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = toy.write_jsonl(out / "rows.jsonl", toy.rows(400))
    found = []
    for number, run in enumerate(RUNS):
        steps = seconds(run, rows, out / str(number))[2:]
        found.append(run._asdict() | {"median": statistics.median(steps), "steps": steps})
        print(json.dumps(found[-1]), flush=True)
    (out / "processes.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| method | scaling | processes | rows | s a step | rows a second | of ideal |")
    print("|---|---|---|---|---|---|---|")
    for entry in found:
        alone = next(
            e for e in found if (e["method"], e["scaling"]) == (entry["method"], entry["scaling"])
        )
        speed = entry["rows"] / entry["median"]
        cores = min(entry["processes"], len(CORES))
        ideal = speed / (cores * alone["rows"] / alone["median"])
        name, scaling, processes, size = (entry[n] for n in Run._fields)
        cells = (
            name,
            scaling,
            processes,
            size,
            f"{entry['median']:.2f}",
            f"{speed:.2f}",
            f"{ideal:.0%}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()

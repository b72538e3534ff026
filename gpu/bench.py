"""Speed and memory of training and generation on one accelerator, beside TRL + PEFT: a JSON file and a page.

    python gpu/bench.py --out runs/bench

Runs by itself within `--minutes`: each case is a process of its own, in order of importance, and those that
no longer fit are listed as such. Without a GPU a small run shows that each path works. Of what the library
asks for, jax, flax, optax, orbax and transformers must be installed; `gpu/bundle.sh` brings the rest along
in a folder (`--bring`), and TRL, to a machine without a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import bench_report  # noqa: E402
import bench_trace  # noqa: E402
from bench_cases import CPU, GPU, Case  # noqa: E402

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "torch",
    "peft",
    "trl",
)
PROBE = "probe"
WRITE_UP = 5  # seconds that are kept for the last page


def main() -> None:
    """Measures what fits into the time, and writes the page anew after each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="cases whose name has one of these"
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="the case to take apart; one has it by default"
    )
    parser.add_argument("--bring", type=Path, default=HERE / "bring", help="folder of bundle.sh")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of its own: measure this one
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.append(str(args.bring))  # last: what is installed comes first
    if args.case:
        args.result.write_text(json.dumps(measured(args.case, args.result.parent)))
        return
    if args.list:
        print(*(f"{case.name}  ~{case.seconds} s" for case in [*GPU, *CPU]), sep="\n")
        return
    report = measure_all(args, time.monotonic() + 60 * args.minutes)
    failed = [r["name"] for r in report["cases"] if r["status"] == "failed"]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def measure_all(args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The report, which is in the folder's `bench.json` and `bench.md` after every case."""
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": args.minutes,
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "probe": {},
        "cases": [],
        "costs": None,
    }
    run = Runner(args.bring)
    probe = run(PROBE, 120)
    if probe["status"] != "done":
        raise SystemExit(f"the device cannot be used: {probe['why']}")
    report["probe"] = probe.pop("figures")
    on_gpu = report["probe"]["platform"] == "gpu"
    cases = chosen(GPU if on_gpu else CPU, args.only, args.profile)
    for result in results(cases, run, deadline - WRITE_UP):
        if result["status"] == "done":
            top = result.pop("costs", None)
            result = bench_report.with_rates(result, report["probe"])
            if top is not None:
                report["costs"] = {"case": result["name"], **top}
        report["cases"].append(result)
        report["seconds"] = time.monotonic() - start
        report["aims"] = bench_report.aims(report["cases"], report["probe"])
        write(args.out, report)
        rate = result.get("tokens_per_second")
        told = result.get("why") or f"{rate:.4g} tokens/s"
        print(
            f"{report['seconds']:5.0f} s  {result['name']}: {result['status']}: {told}", flush=True
        )
    return report


def chosen(cases: Sequence[Case], only: Sequence[str] | None, profile: str | None) -> list[Case]:
    """The cases that were asked for, in their order.

    Raises:
        SystemExit: no case has such a name.
    """
    if only is not None:
        for part in only:
            if not any(part in case.name for case in cases):
                names = ", ".join(case.name for case in cases)
                raise SystemExit(f"--only {part}: no case has that in its name; there are {names}")
        cases = [case for case in cases if any(part in case.name for part in only)]
    if profile is not None:
        if profile not in [case.name for case in cases]:
            names = ", ".join(case.name for case in cases)
            raise SystemExit(f"--profile {profile}: it is none of the cases; there are {names}")
        cases = [dataclasses.replace(case, profile=case.name == profile) for case in cases]
    return list(cases)


def results(
    cases: Sequence[Case],
    run: Callable[[str, float], dict[str, Any]],
    deadline: float,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """Each case with its figures, or with why there are none: none is left out in silence.

    A case begins where what it takes is left. It is stopped at the deadline, or when it has taken twice as
    long and half a minute.

    Args:
        cases: in the order in which they are run.
        run: `(name, limit in seconds) -> result`.
        deadline: on the clock of `now`.
        now: seconds.
    """
    for case in cases:
        about = {"name": case.name, **dataclasses.asdict(case)}
        if missing := lacking(case):
            why = f"{' and '.join(missing)} cannot be imported"
            yield about | {"status": "not run", "why": why}
            continue
        left = deadline - now()
        if left < case.seconds:
            why = f"out of time: {max(left, 0):.0f} s were left, it takes about {case.seconds}"
            yield about | {"status": "not run", "why": why}
            continue
        found = run(json.dumps(dataclasses.asdict(case)), min(left, 2 * case.seconds + 30))
        yield about | found.pop("figures", {}) | found


def lacking(case: Case) -> list[str]:
    """Packages of the other side that are not there; of TRL but for pairs a loop takes the place."""
    if case.side == "trainjax":
        return []
    needed = ("torch", "transformers", "peft", *(["trl"] if case.method == "dpo" else []))
    return [name for name in needed if importlib.util.find_spec(name) is None]


class Runner:
    """Runs this script for one case in a process of its own."""

    def __init__(self, bring: Path, script: Path = Path(__file__)) -> None:
        self._command = [sys.executable, str(script), "--bring", str(bring)]

    def __call__(self, case: str, limit: float) -> dict[str, Any]:
        """The figures, or the last line of what went wrong."""
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            result, log = Path(folder) / "result.json", Path(folder) / "log"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*self._command, "--case", case, "--result", str(result)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(Path(folder)),
                    start_new_session=True,  # so that it ends with whatever it has started
                )
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    return {"status": "stopped", "why": f"it took more than {limit:.0f} s"}
                finally:
                    _end(process)
            if status:
                lines = [
                    line for line in log.read_text(errors="replace").splitlines() if line.strip()
                ]
                why = lines[-1][:500] if lines else f"exit status {status}"
                return {"status": "failed", "why": why, "log": lines[-30:]}
            return {"status": "done", "figures": json.loads(result.read_text())}


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def environment(folder: Path) -> dict[str, str]:
    """Of a case: the program's text for the profile, one device and most of its memory, no network."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=^jit_step$"
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "XLA_CLIENT_MEM_FRACTION": "0.92",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def measured(case: str, folder: Path) -> dict[str, Any]:
    """What a process of its own finds out."""
    if case == PROBE:
        import bench_ours

        return bench_ours.probe()
    settings = Case(**json.loads(case))
    if settings.side == "torch":
        import bench_torch

        return bench_torch.measure(settings)
    import bench_ours

    trace = folder / "trace" if settings.profile and settings.method != "generate" else None
    figures = bench_ours.measure(settings, trace)
    if trace is not None:
        try:
            costs = bench_trace.top_costs(bench_trace.read(trace), bench_trace.sources_of(folder))
            figures["costs"] = {"steps": 2, "top": [cost._asdict() for cost in costs]}
        except ValueError as error:  # the figures are there all the same
            figures["costs"] = {"why": figures.pop("profile_error", None) or str(error)}
    return figures


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files."""
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "bench.md").write_text(bench_report.page(report))


def version(package: str) -> str | None:
    """Of an installed or brought package; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the host is, and how many processes wanted its cores in the minute before."""
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()

"""Several processes of `trainjax` on this machine, as a scheduler would start them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # as in tests/conftest.py
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_experimental_ynn_fusion_type="]
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "XLA_FLAGS": " ".join(_FLAGS),
}
"""For processes whose programs run for a moment: a toy's start takes half of the processor's time."""


class Processes:
    """A job in `count` processes, which find one another at a port of this machine.

    Args:
        count: how many; a single one is told of no other.
        args: of `trainjax`, the same for all.
        folder: where their output goes.
        each: further ones of each.
        program: what takes them; the command line of `trainjax` by default.
        environ: of all of them.
    """

    def __init__(
        self,
        count: int,
        args: Sequence[str],
        folder: Path,
        each: Sequence[Sequence[str]] = (),
        program: Sequence[str] = ("-m", "trainjax.cli"),
        environ: Mapping[str, str] = QUICK,
    ) -> None:
        self.folder, address = folder, f"localhost:{_free_port()}"
        theirs = {
            n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "XLA_", "SLURM_"))
        }
        theirs |= {"JAX_PLATFORMS": "cpu", "NPROC": "16"} | environ
        self.running = []
        for number in range(count):
            place = [
                f"--coordinator={address}",
                f"--num-processes={count}",
                f"--process-id={number}",
            ]
            own = each[number] if each else []
            command = [
                sys.executable,
                *program,
                *(place if count > 1 else []),
                *args,
                *own,
            ]
            with (folder / f"{number}.log").open("w") as log:
                process = subprocess.Popen(
                    command, env=theirs, stdout=log, stderr=subprocess.STDOUT
                )
            self.running.append(process)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """The exit statuses."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def kill(self, number: int, sign: signal.Signals = signal.SIGKILL) -> None:
        """Sends one of them a signal."""
        self.running[number].send_signal(sign)

    def wait_for_step(self, out: Path, step: int, timeout: float = 120.0) -> None:
        """Returns when a record of this step, or a later one, is in the run's folder."""
        end = time.monotonic() + timeout
        while max(losses(out), default=0) < step:
            if time.monotonic() > end or any(p.poll() is not None for p in self.running):
                raise TimeoutError(self.said())
            time.sleep(0.05)

    def said(self, number: int | None = None) -> str:
        """What they have printed."""
        logs = (
            sorted(self.folder.glob("*.log")) if number is None else [self.folder / f"{number}.log"]
        )
        return "\n".join(log.read_text() for log in logs)


def losses(out: Path) -> dict[int, float]:
    """The loss of every step so far, from the run's records."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]

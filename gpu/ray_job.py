"""A job of trainjax on a Ray cluster that is there: one process a worker, all started again when one is lost.

    python gpu/ray_job.py --workers 2 --gpus 8 -- sft --model ... --data ... --out /nfs/run

Run it on a machine of the cluster, or `ray job submit --address ... -- python gpu/ray_job.py ...`. Every
worker has trainjax installed, and sees --out and --data under the same paths.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LOST = 75  # as trainjax exits where another process of its run has gone
POLL = 0.5  # seconds between two looks at the workers and at the signals to this script


class Worker:
    """One process of the run, where Ray has put it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """A free port of this machine, as the others reach it."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, args: Sequence[str]) -> int:
        """Runs trainjax to its end; returns its status, negative for the signal that killed it."""
        self._process = subprocess.Popen([sys.executable, "-m", "trainjax.cli", *args])
        return self._process.wait()

    def terminate(self) -> None:
        """Has the process stop after a checkpoint."""
        if self._process is not None:
            self._process.terminate()


def main() -> int:
    """Runs the job until it is done; returns the status of `trainjax`."""
    args = _arguments()
    ray.init(address=args.address)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which has a handler of its own
        signal.signal(number, lambda received, _: stopped.append(received))
    for restart in range(args.max_restarts + 1):
        status = _run_once(args, stopped)
        if status == 0 or stopped or not _is_worth_another_try(status):
            break
        print(f"ended with status {status}; restart {restart + 1} of at most {args.max_restarts}")
        time.sleep(args.pause)
    return 128 + stopped[0] if stopped else status


def _is_worth_another_try(status: int) -> bool:
    """Killed by a signal, alone in the run, or stopped after saving; not what is wrong or interrupted."""
    return status < 0 or status == LOST or (status > 128 and status != 130)


def _run_once(args: argparse.Namespace, stopped: list[int]) -> int:
    """Starts all workers and waits for all; returns the status of the first that failed, the cause."""
    bundle = {"CPU": args.cpus} | ({"GPU": args.gpus} if args.gpus else {})
    group = placement_group([bundle] * args.workers, strategy=args.strategy)
    workers: list[Any] = []
    try:
        while not group.wait(POLL):
            if stopped:
                return 128 + stopped[0]
        # A second thread of each hears `terminate` while the first one waits for the process.
        actor = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_concurrency=2)(Worker)
        for index in range(args.workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            workers.append(actor.options(scheduling_strategy=place).remote())
        return _follow(args, workers, stopped)
    except ray.exceptions.RayError as error:
        print(f"a worker was lost before it began: {error}")
        return LOST
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)


def _follow(args: argparse.Namespace, workers: Sequence[Any], stopped: list[int]) -> int:
    address = ray.get(workers[0].address.remote())
    running = {}
    for index, worker in enumerate(workers):
        place = [f"--coordinator={address}", f"--num-processes={args.workers}"]
        place = [*place, f"--process-id={index}"] if args.workers > 1 else []
        running[worker.run.remote([*place, *args.job, "--resume"])] = worker
    first, deadline, was_told = 0, float("inf"), False
    while running and time.monotonic() < deadline:
        if stopped and not was_told:
            was_told = True
            for worker in running.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(worker.terminate.remote())
        for ended in ray.wait(list(running), timeout=POLL)[0]:
            del running[ended]
            try:
                status = ray.get(ended)
            except ray.exceptions.RayError:  # the worker has gone, with its machine or alone
                status = LOST
            if status and not first:
                first, deadline = status, time.monotonic() + args.patience
    return first


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, default=1, help="processes of the run [1]")
    add(
        "--gpus", type=int, default=8, help="GPUs of a worker: those of a node, 1, or 0 for CPU [8]"
    )
    add("--cpus", type=int, default=8, help="CPU cores of a worker [8]")
    add(
        "--strategy",
        choices=["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"],
        default="SPREAD",
        help="workers on different nodes, or on one: SPREAD for a worker a node, PACK for one a GPU [SPREAD]",
    )
    add("--address", default="auto", help="of the cluster [the one that this machine is in]")
    add("--max-restarts", type=int, default=100, help="after which it gives up [100]")
    add("--patience", type=float, default=90.0, help="seconds for the others after the first [90]")
    add("--pause", type=float, default=0.0, help="seconds before a restart [0]")
    add("job", nargs="+", metavar="-- JOB [FLAG ...]", help="of trainjax; --resume is added")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

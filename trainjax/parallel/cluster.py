"""Several processes as one run: where the others are, and how they are joined.

The engine is `jax.distributed`, and a scheduler starts the processes. What is here reads who a process
is from the scheduler's variables, and says in a sentence what is wrong where JAX would abort.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Cluster(NamedTuple):
    """One process's place among all.

    Attributes:
        kind: who started the processes.
        coordinator: `host:port` of process 0; None where JAX asks the platform for all of it.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        devices: the local accelerators that are this process's own; None for all that it sees.
    """

    kind: str
    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    devices: tuple[int, ...] | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    heartbeat: int = 30,
) -> Cluster | None:
    """Joins the processes of this run, if there are several; call it before anything asks for devices.

    Started by `srun`, `mpirun`, in an indexed Kubernetes job, or on a TPU, a process finds the others
    by itself. Elsewhere the three settings say it, or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID`. A second call does nothing.

        tj.parallel.initialize()                                # in a job of a scheduler
        tj.parallel.initialize("10.0.0.1:1234", 2, process_id)  # by hand

    Args:
        coordinator: `host:port` of process 0, as all processes reach it.
        num_processes: how many processes the run has.
        process_id: which one this is, from 0.
        timeout: seconds to wait for the others.
        heartbeat: seconds of silence after which a process counts as dead, and the others end.

    Returns:
        This process's place, or None for a single process.

    Raises:
        ValueError: settings that are incomplete or contradict one another.
        OSError: the coordinator cannot be reached within the time.
    """
    if jax.distributed.is_initialized():
        return _joined[-1] if _joined else None
    cluster = find(os.environ, coordinator, num_processes, process_id)
    if cluster is None:
        return None
    _joined.append(cluster)
    if cluster.coordinator is None:
        jax.distributed.initialize()
        return cluster
    if cluster.process_id > 0:
        _wait_for(cluster, timeout)
    with _exit_after(timeout, _nobody_came(cluster, timeout)):
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            None if cluster.devices is None else list(cluster.devices),
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout) + 60,  # what is above comes first, with words
            heartbeat_timeout_seconds=heartbeat,
        )
    return cluster


_joined: list[Cluster] = []


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what there is one of."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error is what a process gets when another one of its run has gone.

    In a step it is the collective's, between steps that of JAX's coordination service, and in a save
    Orbax's own, which has waited for the other one in vain.
    """
    signs = ["Gloo", "NCCL", "Connection closed by peer", "Timed out while waiting for"]
    signs += ["coordination service", "CoordinationService"]
    said = f"{error} {error.__cause__}"
    return jax.distributed.is_initialized() and any(sign in said for sign in signs)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` is the same for all, and another every time."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def as_first(fact: bool) -> bool:
    """What the first process found, for all: each for itself may look at a file at another moment."""
    return fact if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(fact))


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raises where processes of one run differ in a setting, with both values.

    Args:
        settings: what has to be the same, as JSON.

    Raises:
        ValueError: the name, and what the first process and another have.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(settings, default=str).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    first, *others = (json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded))
    for number, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the processes of a run have the same settings, but process 0 has "
                    f"{name}={first.get(name)!r} and process {number} has {other.get(name)!r}"
                )


def find(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """This process's place by settings and environment variables, or None for a single process.

    Settings come first, then JAX's variables, then those of a scheduler.

    Raises:
        ValueError: as `initialize`.
    """
    given = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(num_processes, environ, "JAX_NUM_PROCESSES"),
        "process_id": _number(process_id, environ, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
    }
    is_named = process_id is not None or given["coordinator"] or given["num_processes"] is not None
    if is_named:
        return _checked(given, environ)
    for scheduler in (_slurm, _open_mpi, _tpu):
        if (found := scheduler(environ)) is not None:
            return found
    return None


def _checked(given: Mapping[str, object], environ: Mapping[str, str]) -> Cluster:
    """The place that settings name, if they name all of it."""
    missing = [name for name, value in given.items() if value is None]
    if missing:
        known = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ValueError(f"a run of several processes needs {' and '.join(missing)} beside {known}")
    coordinator, count, index = (
        str(given["coordinator"]),
        given["num_processes"],
        given["process_id"],
    )
    assert isinstance(count, int)
    assert isinstance(index, int)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator={coordinator!r} is not of the form host:port")
    if not 0 <= index < count:
        raise ValueError(f"process_id={index} is not one of num_processes={count}, from 0")
    kind = "Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else "settings"
    return Cluster(kind, coordinator, count, index)


def _number(given: int | None, environ: Mapping[str, str], *names: str) -> int | None:
    """A setting, or the first of the variables that is there."""
    if given is not None:
        return given
    for name in names:
        if name in environ:
            if not environ[name].isdecimal():
                raise ValueError(f"{name}={environ[name]!r} is not a whole number")
            return int(environ[name])
    return None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A task of `srun`. The script of `sbatch` itself is not one, though it has variables alike."""
    count = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1 or "SLURM_PROCID" not in environ:
        return None
    host = _first_host(environ["SLURM_STEP_NODELIST"])
    port = environ.get("JAX_COORDINATOR_PORT", str(61440 + int(environ["SLURM_JOB_ID"]) % 4096))
    on_this_node = _per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    devices = _own_devices(environ, int(environ["SLURM_LOCALID"]), on_this_node)
    return Cluster("SLURM", f"{host}:{port}", count, int(environ["SLURM_PROCID"]), devices)


def _first_host(nodes: str) -> str:
    """The first of a list in SLURM's notation.

    >>> _first_host("gpu[003-007,9],login"), _first_host("a1,b2")
    ('gpu003', 'a1')
    """
    prefix, numbers = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes).groups("")  # type: ignore[union-attr]
    return f"{prefix}{numbers}"


def _per_node(tasks: str) -> list[int]:
    """Tasks on each node, from SLURM's notation.

    >>> _per_node("8(x2),4")
    [8, 8, 4]
    """
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    count = int(environ.get("OMPI_COMM_WORLD_SIZE", 1))
    if count == 1:
        return None
    index, local = (int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "LOCAL_RANK"))
    devices = _own_devices(environ, local, int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"]))
    # What mpirun tells of itself: the host where it runs, which also has rank 0, and a number of the job.
    server = environ.get("OMPI_MCA_orte_hnp_uri") or environ.get("PMIX_SERVER_URI2", "")
    job, host = re.match(r"(\d+)", server), re.search(r"tcp[46]?://\[?([^:,\]]+)", server)
    if host is None:
        raise ValueError(
            "mpirun does not say where process 0 is: set JAX_COORDINATOR_ADDRESS=host:port, "
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID for every process"
        )
    number = int(job.group(1)) if job else 0
    port = environ.get("JAX_COORDINATOR_PORT", str(61440 + number % 4096))
    return Cluster("Open MPI", f"{host.group(1)}:{port}", count, index, devices)


def _own_devices(environ: Mapping[str, str], local: int, count: int) -> tuple[int, ...] | None:
    """Devices of this process: its GPU where there is a process for each, else all of the node's.

    Where the scheduler shows each process its own GPU only, that is all that it sees.
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    if count == 1 or (shown and "," not in shown):
        return None
    return (local,)


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    """A host of a TPU slice; JAX asks the machine's metadata for the others."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if (
        chips
        and importlib.util.find_spec("libtpu")
        and environ.get("JAX_PLATFORMS", "tpu") != "cpu"
    ):
        return Cluster("TPU")
    return None


def _wait_for(cluster: Cluster, timeout: float) -> None:
    """Returns when the coordinator answers."""
    assert cluster.coordinator is not None
    host, _, port = cluster.coordinator.rpartition(":")
    end, reason = time.monotonic() + timeout, "no answer"
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.2, timeout / 10))
    raise OSError(
        f"process {cluster.process_id} of {cluster.num_processes} could not reach the coordinator at "
        f"{cluster.coordinator} within {timeout:g} s ({reason}): is process 0 running, does its name "
        "resolve here, and is the port open between the nodes?"
    )


def _nobody_came(cluster: Cluster, timeout: float) -> str:
    return (
        f"process {cluster.process_id} of {cluster.num_processes} waited {timeout:g} s at "
        f"{cluster.coordinator} and not all processes came: were all {cluster.num_processes} started, "
        "with the same coordinator and number?"
    )


@contextmanager
def _exit_after(timeout: float, message: str) -> Iterator[None]:
    """Ends the process with a sentence if the block takes longer.

    JAX waits for the other processes in C++, where nothing can be raised, and then aborts.
    """

    def end() -> None:
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

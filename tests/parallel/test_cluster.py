"""Who a process is, from the variables of those who start processes, and what is said where it cannot be."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from trainjax import cli, parallel

SLURM = {  # of a task of `srun --nodes 3 --ntasks 20`, as SLURM 22 sets them
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
MPI = {  # of `mpirun -n 4`, Open MPI 4
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "node-0.run:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, parallel.Cluster("SLURM", "gpu003:61441", 20, 11, (3,))),
        (
            SLURM | {"JAX_COORDINATOR_PORT": "99"},
            parallel.Cluster("SLURM", "gpu003:99", 20, 11, (3,)),
        ),
        # Each task sees its own GPU only, or is alone on its node and has all of them.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, parallel.Cluster("SLURM", "gpu003:61441", 20, 11)),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x20)", "SLURM_LOCALID": "0"},
            parallel.Cluster("SLURM", "gpu003:61441", 20, 11),
        ),
        # The script of sbatch itself, and a step of one task.
        ({n: v for n, v in SLURM.items() if "STEP" not in n} | {"SLURM_NTASKS": "20"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (MPI, parallel.Cluster("Open MPI", "10.96.0.1:61440", 4, 2, (0,))),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (JAX, parallel.Cluster("settings", "node-0.run:1234", 4, 3)),
        (JAX | SLURM, parallel.Cluster("settings", "node-0.run:1234", 4, 3)),
        (POD, None),
        (
            {n: v for n, v in JAX.items() if n != "JAX_PROCESS_ID"} | POD,
            parallel.Cluster("Kubernetes", "node-0.run:1234", 4, 1),
        ),
    ],
)
def test_a_process_knows_its_place_by_the_schedulers_variables(environ, expected):
    assert parallel.find(environ) == expected


def test_settings_come_before_variables():
    found = parallel.find(JAX, "other:1", 2, 0)
    assert found == parallel.Cluster("settings", "other:1", 2, 0)


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        (("a:1", None, None), {}, "needs num_processes and process_id beside coordinator=a:1"),
        ((None, None, 1), {}, "needs coordinator and num_processes beside process_id=1"),
        (("a", 2, 0), {}, "coordinator='a' is not of the form host:port"),
        (("a:1", 2, 2), {}, "process_id=2 is not one of num_processes=2, from 0"),
        (("a:1", 2, None), {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x' is not a whole number"),
        (
            (None, None, None),
            {n: v for n, v in MPI.items() if "hnp" not in n},
            "mpirun does not say where process 0 is: set JAX_COORDINATOR_ADDRESS",
        ),
    ],
)
def test_a_place_that_cannot_be_is_refused(settings, environ, message):
    with pytest.raises(ValueError, match=message):
        parallel.find(environ, *settings)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--process-id", "one", "sft"], "--process-id is a whole number, not 'one'"),
        (["--num-processes"], "--num-processes needs a value: a whole number"),
    ],
)
def test_the_command_line_takes_the_place_before_the_job(args, message, capsys):
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer_is_named():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("localhost", 0))
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(
            OSError, match=f"process 1 of 2 could not reach .* {address} within 0.5 s"
        ):
            parallel.initialize(address, 2, 1, timeout=0.5)


def test_a_coordinator_to_whom_nobody_comes_ends_with_a_sentence():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = f"from trainjax import parallel; parallel.initialize({address!r}, 2, 0, timeout=1.0)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1
    assert f"process 0 of 2 waited 1 s at {address} and not all processes came" in found.stderr


def test_one_process_is_its_own_cluster():
    assert parallel.is_first()
    parallel.wait_for_all("nobody else")
    parallel.check_agreement({"steps": 3})
    assert not parallel.is_peer_lost(ValueError("Gloo all-reduce failed"))


@pytest.mark.parametrize(
    "message",
    [
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error",
        "INTERNAL: Barrier failed. RPC: /xla.coordination.CoordinationService/Barrier",
        "Timed out while waiting for async_write_complete barrier.",
    ],
)
def test_a_lost_process_is_known_by_its_error(message, monkeypatch):
    """What a process said that another one had left, in a step, between two and in a save."""
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert parallel.is_peer_lost(RuntimeError(message))
    wrapped = OSError("the checkpoint of step 5 could not be written to run")
    assert not parallel.is_peer_lost(wrapped)
    wrapped.__cause__ = RuntimeError(message)
    assert parallel.is_peer_lost(wrapped)

"""`gpu/slurm.sbatch` as it is, on a SLURM of this machine: two tasks, ended and queued again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests import toy
from tests.kits import launching, slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(slurm.missing()),
        reason=f"SLURM is not installed: no {', '.join(slurm.missing())} (Debian: slurm-wlm, munge)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root here"),
]

STEPS, SAVE_EVERY = 120, 1000  # nothing is saved but by a signal
TELL = 'echo "$SLURM_PROCID $$" >>"$PIDS"'


@pytest.fixture(scope="module")
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,  # short: a socket's path is
        slurm.Slurm(Path(folder)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    # A learning rate at which rounding, which the two splits do differently, does not grow.
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "learning_rate": 1e-3}
    return launching.flags(tmp_path_factory.mktemp("toy"), **settings)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """The run in one process, without SLURM."""
    folder = tmp_path_factory.mktemp("alone")
    command = ["trainjax", *flags, f"--out={folder / 'run'}"]
    subprocess.run(command, env=launching.command(folder / "bin"), check=True)
    return folder / "run"


class Job:
    """The script, submitted with two tasks on this machine instead of its nodes of GPUs."""

    def __init__(self, cluster: slurm.Slurm, flags: list[str], folder: Path, *options: str) -> None:
        self.cluster, self.run, self.log = cluster, folder / "run", folder / "log"
        self.pids = folder / "pids"
        environ = launching.command(folder / "bin", TELL) | cluster.environ
        here = ["--nodes=1", "--ntasks-per-node=2", "--gres=none", f"--output={self.log}", *options]
        script = launching.ROOT / "gpu" / "slurm.sbatch"
        args = [*flags, "--mesh.fsdp=2", f"--out={self.run}"]
        command = ["sbatch", "--parsable", *here, str(script), *args]
        environ |= {"PIDS": str(self.pids)}
        done = subprocess.run(
            command, env=environ, check=True, capture_output=True, text=True, cwd=folder
        )
        self.id = int(done.stdout)

    def said(self) -> str:
        return f"{self.log.read_text() if self.log.exists() else ''}\n{self.cluster.said()}"

    def state(self, name: str = "JobState") -> str:
        return self.cluster.state(self.id)[name]

    def wait(self, is_so) -> None:
        try:
            self.cluster.wait(is_so)
        except TimeoutError:
            raise TimeoutError(self.said()) from None

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: launching.last_step(self.run) >= step)

    def finish(self) -> None:
        self.wait(lambda: self.state() in ("COMPLETED", "FAILED"))
        assert self.state() == "COMPLETED", self.said()


def assert_same(run: Path, alone: Path) -> None:
    found, expected = (toy.trace(path) for path in (run, alone))
    assert [r["step"] for r in found] == [r["step"] for r in expected] == [*range(1, STEPS + 1)]
    np.testing.assert_allclose(
        [r["loss"] for r in found], [r["loss"] for r in expected], rtol=0, atol=1e-5
    )


def assert_no_step_was_lost(job: Job, reached: int) -> None:
    (resumed,) = re.findall(r"resuming after step (\d+)", job.log.read_text())
    assert int(resumed) >= reached
    assert f"stopped by SIGTERM after step {resumed}" in job.log.read_text()


def test_two_tasks_make_the_run_of_one_process(cluster, flags, alone, tmp_path):
    job = Job(cluster, flags, tmp_path)
    job.finish()
    assert_same(job.run, alone)
    assert sorted(line.split()[0] for line in job.pids.read_text().splitlines()) == ["0", "1"]


def test_a_job_that_is_queued_again_goes_on_after_its_last_step(cluster, flags, alone, tmp_path):
    """As at preemption: SLURM ends the tasks with SIGTERM, and has the job in its queue again."""
    job = Job(cluster, flags, tmp_path)
    job.wait_for_step(20)
    reached = launching.last_step(job.run)
    cluster.ask("scontrol", "requeue", str(job.id))
    job.finish()
    assert job.state("Restarts") == "1"
    assert_no_step_was_lost(job, reached)
    assert_same(job.run, alone)


def test_sigterm_before_the_time_limit_queues_the_job_again(cluster, flags, alone, tmp_path):
    """What `--signal=TERM@120` sends, to the tasks and not to the script."""
    job = Job(cluster, flags, tmp_path)
    job.wait_for_step(20)
    reached = launching.last_step(job.run)
    cluster.ask("scancel", "--signal=TERM", str(job.id))
    job.finish()
    assert "status 143: queued again" in job.log.read_text()
    assert job.state("Restarts") == "1"
    assert_no_step_was_lost(job, reached)
    assert_same(job.run, alone)


def test_a_killed_task_queues_the_job_again(cluster, flags, alone, tmp_path):
    job = Job(cluster, [*flags, "--save-every=10"], tmp_path)
    job.wait_for_step(25)
    _, pid = job.pids.read_text().splitlines()[0].split()
    os.kill(int(pid), signal.SIGKILL)
    job.finish()
    assert job.state("Restarts") == "1"
    assert re.search(r"resuming after step [1-9]\d*0\b", job.log.read_text())
    assert_same(job.run, alone)


def test_a_job_that_is_wrong_or_cancelled_is_not_queued_again(cluster, flags, tmp_path):
    wrong = Job(cluster, [*flags, "--learning-rte=1"], tmp_path)
    wrong.wait(lambda: wrong.state() == "FAILED")
    assert wrong.state("ExitCode") == "2:0"
    assert "learning-rte" in wrong.log.read_text()
    folder = tmp_path / "cancelled"
    folder.mkdir()
    cancelled = Job(cluster, flags, folder)
    cancelled.wait_for_step(5)
    cluster.ask("scancel", str(cancelled.id))
    cancelled.wait(lambda: not cluster.ask("squeue", "--noheader", f"--jobs={cancelled.id}"))
    assert cancelled.state() == "CANCELLED"
    assert cancelled.state("Restarts") == "0"

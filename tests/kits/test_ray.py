"""`gpu/ray_job.py` on a Ray of this machine: two workers, one of which is killed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import toy
from tests.kits import launching

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray (extra `ray`) is not installed"
    ),
]

STEPS, SAVE_EVERY = 200, 5


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """Of a cluster that was started before the job, on ports of its own, and ends with the tests."""
    environ = launching.command(tmp_path_factory.mktemp("user") / "bin")
    environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: a socket's path is
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--port=0", "--num-cpus=4", "--num-gpus=0", "--include-dashboard=false"]
        command += [f"--temp-dir={folder}", "--object-store-memory=100000000"]
        log = Path(folder) / "log"
        with log.open("w") as out:
            cluster = subprocess.Popen(command, env=environ, stdout=out, stderr=out)
        try:
            end = time.monotonic() + 120
            while not (found := re.search(r"--address='([^']+)'", log.read_text())):
                assert cluster.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield environ | {"RAY_ADDRESS": found[1]}
        finally:
            cluster.terminate()
            try:
                cluster.wait(60)
            except subprocess.TimeoutExpired:
                cluster.kill()
                cluster.wait()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "mesh.fsdp": 2}
    return launching.flags(tmp_path_factory.mktemp("toy"), **settings)


def started(environ, flags, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / "log"
    script = launching.ROOT / "gpu" / "ray_job.py"
    own = [f"--address={environ['RAY_ADDRESS']}", "--workers=2", "--gpus=0", "--cpus=1"]
    command = [sys.executable, str(script), *own, "--", *flags, f"--out={folder / 'run'}"]
    with log.open("w") as out:
        return subprocess.Popen(command, env=environ, stdout=out, stderr=out), log


def wait_for_step(job, log: Path, run: Path, step: int) -> None:
    end = time.monotonic() + 600
    while launching.last_step(run) < step:
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def training(run: Path) -> list[int]:
    """The processes of a run that its workers have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"trainjax.cli" in words and f"--out={run}".encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def whole(environ, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    job, log = started(environ, flags, folder)
    assert job.wait(600) == 0, log.read_text()
    return folder / "run"


def test_a_killed_process_is_started_again_and_the_run_is_the_same(environ, flags, whole, tmp_path):
    assert len(toy.exact(whole)) == STEPS
    run = tmp_path / "run"
    job, log = started(environ, flags, tmp_path)
    wait_for_step(job, log, run, 20)
    processes = training(run)
    assert len(processes) == 2
    os.kill(processes[0], signal.SIGKILL)
    assert job.wait(600) == 0, log.read_text()
    assert "ended with status -9; restart 1 of at most 100" in log.read_text()
    assert re.search(r"resuming after step [1-9]", log.read_text())
    assert toy.exact(run) == toy.exact(whole)


def test_sigterm_saves_and_ends_the_job(environ, flags, tmp_path):
    run = tmp_path / "run"
    job, log = started(environ, flags, tmp_path)
    wait_for_step(job, log, run, 10)
    job.terminate()
    assert job.wait(300) == 128 + signal.SIGTERM, log.read_text()
    assert launching.newest(run) == launching.last_step(run)
    assert training(run) == []


def test_a_job_that_is_wrong_is_not_started_again(environ, flags, tmp_path):
    job, log = started(environ, [*flags, "--learning-rte=1"], tmp_path)
    assert job.wait(300) == 2, log.read_text()
    assert "restart" not in log.read_text()

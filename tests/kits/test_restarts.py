"""A run of two processes that is killed again and again, under the script that restarts it."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import toy
from tests.kits import launching

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 300, 5
KILLS = int(os.environ.get("KILLS", "15"))  # each takes a start of two processes
# Each process tells its number and what it finds in the run's folder.
TELL = r"""
there=$(ls "$RUN/checkpoints" 2>/dev/null)
whole=$(grep -xE '[0-9]+' <<<"$there" | sort -n | tail -n 1)
echo "$$ ${whole:-0} $(grep -c tmp <<<"$there")" >>"$RUN.started"
"""


class Start(NamedTuple):
    """A process of the job: its id, the newest whole checkpoint that it found, how many half ones."""

    pid: int
    whole: int
    half: int


class Restarted:
    """The job under the script."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        self.run, self.log = folder / "run", folder / "log"
        environ = launching.command(folder / "bin", TELL)
        with self.log.open("w") as log:
            self.script = subprocess.Popen(
                [launching.ROOT / "gpu" / "run_until_done.sh", *flags, f"--out={self.run}"],
                env=environ | {"PROCESSES": "2", "RUN": str(self.run)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.log.read_text()

    def starts(self, attempt: int) -> list[Start]:
        """The two processes of an attempt, from 0, once both are there."""
        path = self.run.with_name("run.started")
        self.wait(lambda: path.exists() and len(path.read_text().splitlines()) >= 2 * attempt + 2)
        lines = path.read_text().splitlines()[2 * attempt : 2 * attempt + 2]
        return [Start(*map(int, line.split())) for line in lines]

    def wait(self, is_so, timeout: float = 600.0) -> None:
        end = time.monotonic() + timeout
        while not is_so():
            assert self.script.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def resumed(self) -> list[int]:
        """The step after which each attempt began that came so far."""
        found = re.findall(r"resuming after step (\d+)|(starting from the beginning)", self.said())
        return [int(step or 0) for step, _ in found]

    def is_training(self) -> bool:
        """Whether the attempt that runs now has done a step."""
        _, _, now = self.said().rpartition("; restart ")
        return re.search(r"^step \d+/", now, re.MULTILINE) is not None


@contextmanager
def restarted(flags: list[str], folder: Path) -> Iterator[Restarted]:
    job = Restarted(flags, folder)
    try:
        yield job
    finally:
        job.script.terminate()
        job.script.wait(120)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "mesh.fsdp": 2}
    return launching.flags(folder, **settings)


class Whole(NamedTuple):
    """The uninterrupted run: its folder, seconds to the first step and from there to the end."""

    run: Path
    before: float
    training: float


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    begin = time.monotonic()
    with restarted(flags, tmp_path_factory.mktemp("whole")) as job:
        job.wait(lambda: launching.last_step(job.run) > 0)
        first = time.monotonic()
        assert job.script.wait(600) == 0, job.said()
    return Whole(job.run, first - begin, time.monotonic() - first)


def assert_like_the_whole(job: Restarted, whole: Whole) -> None:
    assert job.script.wait(600) == 0, job.said()
    assert len(toy.exact(whole.run)) == STEPS
    assert toy.exact(job.run) == toy.exact(whole.run)


def test_kills_at_random_moments_lose_nothing_that_was_saved(flags, whole, tmp_path):
    """SIGKILL to one of two: in the start, in a step, in the writing of a checkpoint."""
    rng = random.Random(0)
    lost, found_half = [], 0
    with restarted(flags, tmp_path) as job:
        for attempt in range(KILLS):
            processes, begun = job.starts(attempt), len(job.resumed())
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, whole.before))
            else:
                job.wait(job.is_training)
                time.sleep(rng.uniform(0, whole.training / 16))
            os.kill(rng.choice(processes).pid, signal.SIGKILL)
            again = job.starts(attempt + 1)[0]  # both have ended
            for step in job.resumed()[begun:][:1]:  # it came as far as to read a checkpoint
                assert step == processes[0].whole
            lost.append(launching.last_step(job.run) - again.whole)
            found_half += again.half > 0
        assert_like_the_whole(job, whole)
    statuses = re.findall(r"ended with status ([\d ]+);", job.said())
    assert len(statuses) == KILLS
    print(f"steps done again: {lost}; checkpoints left half-written: {found_half}; {statuses}")
    # Of two saves the first is whole when the second begins: the steps up to there, which is told of before
    # it begins, are what can be lost while the first is on its way to the disk.
    assert max(lost) <= 2 * SAVE_EVERY, lost
    assert sum(step > 0 for step in lost) > KILLS // 5, (
        lost
    )  # steps were done, and lost, and done again


def test_sigterm_loses_no_step(flags, whole, tmp_path):
    rng = random.Random(1)
    with restarted([*flags, "--save-every=2"], tmp_path) as job:
        for attempt in range(KILLS // 3):
            processes = job.starts(attempt)
            job.wait(job.is_training)
            time.sleep(rng.uniform(0, whole.training / 8))
            os.kill(rng.choice(processes).pid, signal.SIGTERM)
            again = job.starts(attempt + 1)[0]
            assert again.whole == launching.last_step(job.run) > processes[0].whole
            assert again.half == 0
        assert_like_the_whole(job, whole)
    assert job.said().count("ended with status 143 143;") == KILLS // 3, job.said()

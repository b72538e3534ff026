"""A run that is killed again and again ends as the one that was not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from tests import toy

STEPS, KILLS = 60, 10


@pytest.fixture
def command(tmp_path):
    """`trainjax sft` on the toy, in a process of its own."""
    model = toy.model_folder(tmp_path / "model")
    rows = toy.write_jsonl(tmp_path / "rows.jsonl", toy.rows())
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(out, *flags):
        settings = {"model": model, "data": rows, "out": out, "steps": STEPS, "batch-size": 4}
        settings |= {"max-length": 64, "learning-rate": 1e-2, "peft.rank": 4, "peft.dropout": 0.1}
        args = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "trainjax.cli", "sft", *args, *flags]
        with (tmp_path / "said").open("w") as said:
            return subprocess.Popen(command, env=os.environ | cache, stderr=said)

    return start


def steps_done(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
def test_a_run_killed_ten_times_has_the_trace_of_an_uninterrupted_one(command, tmp_path):
    """At moments that a seed draws: between steps, while a checkpoint is written, while one is removed."""
    said = tmp_path / "said"
    assert command(tmp_path / "whole", "--save-every=2").wait() == 0, said.read_text()
    expected = toy.exact(tmp_path / "whole")
    assert len(expected) == STEPS

    run, draw, killed_while_saving = tmp_path / "run", random.Random(0), 0
    for kill in range(KILLS):
        resume = ["--resume"] if kill else []
        process = command(run, f"--save-every={1 + kill % 3}", *resume)
        begin = steps_done(run)
        goal = (kill + 1) * STEPS // (KILLS + 2) + draw.randrange(3)
        while process.poll() is None and not (begin != steps_done(run) and steps_done(run) >= goal):
            time.sleep(0.002)
        time.sleep(0.05 * draw.random())
        assert process.poll() is None, said.read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_while_saving += any((run / "checkpoints").glob("*tmp*"))
    assert command(run, "--save-every=2", "--resume").wait() == 0, said.read_text()
    assert toy.exact(run) == expected
    assert killed_while_saving
    assert not list((run / "checkpoints").glob("*tmp*"))  # what was half written is cleared away
    adapters = [folder / "adapter" for folder in (run, tmp_path / "whole")]
    config, other = ((path / "adapter_config.json").read_text() for path in adapters)
    assert config == other
    # Not the file's bytes: safetensors writes its metadata in any order.
    found, expected = (load_file(path / "adapter_model.safetensors") for path in adapters)
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }

"""Several processes as one run: the same losses, one set of files, and an end that all of them see."""

from __future__ import annotations

import filecmp
import json
import signal

import numpy as np
import pytest

from tests import toy
from tests.parallel.processes import Processes, losses
from trainjax import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a job that trains every weight of the toy model for 30 steps."""
    folder = tmp_path_factory.mktemp("toy")
    model = toy.model_folder(folder / "model")
    rows = toy.write_jsonl(folder / "rows.jsonl", toy.rows())
    settings = {"model": model, "data": rows, "steps": 30, "batch-size": 4, "max-length": 64}
    settings |= {"learning-rate": 1e-2, "save-every": 10, "remat": "none"}
    return ["sft", "--full", *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """The folder of the run in one process: this one."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*flags, f"--out={run}"]) == 0
    return run


def assert_same(out, alone, steps=30):
    found, expected = losses(out), losses(alone)
    assert found.keys() == expected.keys() == set(range(1, steps + 1))
    np.testing.assert_allclose(
        [found[step] for step in expected],
        list(expected.values()),
        rtol=0,
        atol=1e-5,
        err_msg=str(out),
    )


def on_mesh(**sizes):
    """The flags of a mesh whose other axes are of one device."""
    return [f"--mesh.{n}={s}" for n, s in ({"data": 1, "fsdp": 1, "tensor": 1} | sizes).items()]


MESHES = {
    2: [{"data": 2}, {"fsdp": 2}, {"tensor": 2}, {"sequence": 2}, {"slices": 2}],
    4: [
        *({"data": 4}, {"fsdp": 4}, {"sequence": 4}),
        *({"data": 2, "sequence": 2}, {"fsdp": 2, "sequence": 2}, {"tensor": 2, "sequence": 2}),
        *({"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}),
    ],
}
# One run after the other in the same processes, which start once. Words before `--` are all runs'.
RUNS = """
import sys
from trainjax import cli, parallel
place = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:4])
parallel.initialize(place["coordinator"], int(place["num-processes"]), int(place["process-id"]))
shared, *own = " ".join(sys.argv[4:]).split(" -- ")
for flags in own:
    assert cli.main([*shared.split(), *flags.split()]) == 0, flags
"""


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_make_one_run_and_every_split_has_its_losses(
    count, flags, alone, tmp_path
):
    """Two processes compile their programs as a user's do."""
    names = ["-".join(f"{axis}{size}" for axis, size in mesh.items()) for mesh in MESHES[count]]
    args = [*flags, "--save-every=0"]
    for name, mesh in zip(names, MESHES[count], strict=True):
        args += ["--", *on_mesh(**mesh), f"--out={tmp_path / name}"]
    settings = {"environ": {}} if count == 2 else {}
    job = Processes(count, args, tmp_path, program=["-c", RUNS], **settings)
    assert job.wait(1800.0) == [0] * count, job.said()
    for name in names:
        assert_same(tmp_path / name, alone)
        for file in ("config.json", "tokenizer.json"):
            assert filecmp.cmp(tmp_path / name / "model" / file, alone / "model" / file)
    assert ["step 30/30" in job.said(n) for n in range(count)] == [True] + [False] * (count - 1)


LIVE = """
import json, sys
import jax
given = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
from trainjax import models, optim, parallel, train, tree
if "coordinator" in given:
    parallel.initialize(given["coordinator"], int(given["num-processes"]), int(given["process-id"]))
mesh = parallel.mesh(fsdp=-1)
state = train.init(models.load(given["model"], mesh=mesh).params, optim.chain(optim.Chain(learning_rate=0.1)))
held = lambda leaf: sum(shard.data.nbytes for shard in leaf.addressable_shards)
leaves = tree.flatten(state._replace(key=()))
live = sum(map(held, jax.live_arrays()))
print(json.dumps({"leaves": {name: held(leaf) for name, leaf in leaves.items()}, "live": live}))
"""


def test_each_process_holds_its_share_of_what_is_split(flags, tmp_path):
    """Bytes of params and optimizer state on a process's devices; small norms are whole on each."""
    model = next(flag for flag in flags if flag.startswith("--model="))
    held = {}
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        job = Processes(count, [model], folder, program=["-c", LIVE])
        assert job.wait() == [0] * count, job.said()
        held[count] = [json.loads(job.said(n).splitlines()[-1]) for n in range(count)]
    (alone,) = held.pop(1)
    for count, process in ((n, process) for n, processes in held.items() for process in processes):
        shares = {name: alone["leaves"][name] / size for name, size in process["leaves"].items()}
        matrices = [
            share for name, share in shares.items() if "kernel" in name or "embedding" in name
        ]
        assert matrices
        assert set(matrices) == {float(count)}
        assert process["live"] < 1.02 * alone["live"] / count


def test_a_run_goes_on_with_other_processes_on_another_mesh(flags, tmp_path):
    """One, two over `fsdp`, four over both, two over `tensor`, one: stopped by a signal to one of them."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    flags = [
        *flags,
        "--steps=120",
        "--learning-rate=1e-3",
    ]  # at 1e-2 rounding grows past 1e-5 by step 60
    job = Processes(1, [*flags, f"--out={alone}"], tmp_path)
    assert job.wait() == [0], job.said()
    stages = [(1, {}), (2, {"fsdp": 2}), (4, {"fsdp": 2, "tensor": 2}), (2, {"tensor": 2}), (1, {})]
    for number, (count, mesh) in enumerate(stages):
        resume = ["--resume"] if number else []
        logs = tmp_path / str(number)
        logs.mkdir()
        job = Processes(count, [*flags, *on_mesh(**mesh), *resume, f"--out={out}"], logs)
        if number < len(stages) - 1:
            job.wait_for_step(out, max(losses(out), default=0) + 2)
            job.kill(count - 1, signal.SIGTERM)
            statuses = job.wait()
            assert statuses == [128 + signal.SIGTERM] * count, job.said()
            assert job.said().count("stopped by SIGTERM after step") == count
        else:
            assert job.wait() == [0], job.said()
    assert_same(out, alone, steps=120)


def test_a_killed_process_ends_the_other_and_the_run_goes_on(flags, alone, tmp_path):
    """First the one that the others ask for their places, then another."""
    out = tmp_path / "run"
    args = [*flags, "--mesh.fsdp=2", "--save-every=5", f"--out={out}"]
    for killed, step in enumerate((12, 22)):
        job = Processes(2, [*args, "--resume"], tmp_path)
        job.wait_for_step(out, step)
        job.kill(killed)
        statuses = job.wait(60.0)
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] != 0
        said = job.said(1 - killed)
        assert "another process of this run has gone" in said or "another task died" in said
    again = Processes(2, [*args, "--resume"], tmp_path)
    assert again.wait() == [0, 0], again.said()
    assert_same(out, alone)


def test_processes_that_disagree_say_so(flags, tmp_path):
    job = Processes(2, [*flags, f"--out={tmp_path / 'run'}"], tmp_path, each=[[], ["--seed=1"]])
    assert job.wait() == [1, 1]
    for number in (0, 1):
        assert "process 0 has seed=0 and process 1 has 1" in job.said(number)

import dataclasses
import functools
import inspect
import shutil

import pytest

from tests import toy

# Settings that neither a run's optimizer nor its first params depend on.
APART = {"model", "out", "data", "eval_data", "save_every", "keep", "eval_every", "stuck_after"}
APART |= {"resume", "tensorboard", "wandb", "remat", "template", "too_long", "packing"}


def settings(config, apart):
    """What of a job's settings tells one program from another."""
    names = sorted({field.name for field in dataclasses.fields(config)} - apart)
    return type(config), tuple((name, getattr(config, name)) for name in names)


def remembered(f, key):
    """`f` that is asked once for arguments of an equal key; each time for those that have none."""
    found, signature = {}, inspect.signature(f)

    def call(*args, **named):
        args = signature.bind(*args, **named).args
        name = key(*args)
        if name is None:
            return f(*args)
        if name not in found:
            found[name] = f(*args)
        return found[name]

    return call


def optimizer_key(config, steps, model, method):
    """None of shapes alone, in the place of a model."""
    if not model.fingerprint:
        return None
    return settings(config, APART | {"mesh"}), steps, model.fingerprint, method


def start_key(config, start):
    """None of an adapter that was loaded."""
    if start.loaded is not None:
        return None
    return settings(config, APART), start.model.fingerprint, start.method


@pytest.fixture(scope="session")
def shared():
    """What runs with equal settings have in common: the optimizer, the step, what they start with."""
    from trainjax import train
    from trainjax.recipes import _start
    from trainjax.recipes._configs import StepConfig

    return [
        (StepConfig, "optimizer", remembered(StepConfig.optimizer, optimizer_key)),
        (train, "make_step", functools.cache(train.make_step)),
        (_start, "first_params", remembered(_start.first_params, start_key)),
    ]


@pytest.fixture(scope="module", autouse=True)
def one_program_for_equal_settings(shared):
    """Runs of this process with equal settings have the very same step, which so compiles once.

    Methods and losses of equal settings are the same functions anyway; see `trainjax.peft`. A run copies
    what it starts with.
    """
    with pytest.MonkeyPatch.context() as patch:
        for where, name, f in shared:
            patch.setattr(where, name, f)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with the toy model."""
    return toy.model_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file with 24 prompts and completions."""
    return toy.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", toy.rows())


@pytest.fixture(scope="session")
def run_sft(model, rows):
    """Runs `trainjax sft` on the toy and returns the exit status; flags may be other ones, or None.

    The schedule is part of the program, so tests that need no other one keep these settings.
    """
    from trainjax import cli

    def run(*flags, **changes):
        settings = {
            "model": model,
            "data": rows,
            "steps": 8,
            "batch-size": 4,
            "max-length": 64,
            "learning-rate": 1e-2,
            "peft.rank": 4,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        given = {name: value for name, value in settings.items() if value is not None}
        args = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return cli.main(["sft", *args, *map(str, flags)])

    return run


@pytest.fixture
def sft(run_sft, tmp_path):
    """`run_sft` into the test's own folder, `run`."""
    return lambda *flags, **changes: run_sft(*flags, **({"out": tmp_path / "run"} | changes))


@pytest.fixture
def finished(run_sft, rows, tmp_path_factory, tmp_path):
    """A copy of a finished run of 8 steps, with checkpoints after 3, 6 and 8 and evaluations."""
    run = tmp_path_factory.getbasetemp() / "finished"
    if not run.exists():
        settings = {"save_every": 3, "eval_data": rows, "eval_every": 4}
        assert run_sft("--tensorboard", out=run, **settings) == 0
    return shutil.copytree(run, tmp_path / "run")

import shutil

import pytest

from tests import toy


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

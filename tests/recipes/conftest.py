import os
import shutil

import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import helpers, toy


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run makes its functions anew. A cache on disk, shared by the workers of one session,
    spares them the compiler; its size limit is there for the lock that comes with it.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_compilation_cache_max_size": 2**30,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    compilation_cache.reset_cache()
    with helpers.jax_settings(settings):
        yield
    compilation_cache.reset_cache()


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
    """Runs `trainjax sft` on the toy and returns the exit status; flags may be overridden.

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
        args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
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

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


@pytest.fixture
def sft(model, rows, tmp_path):
    """Runs `trainjax sft` on the toy and returns the exit status; flags may be overridden."""
    from trainjax import cli

    def run(*flags, **changes):
        settings = {
            "model": model,
            "data": rows,
            "out": tmp_path / "run",
            "steps": 4,
            "batch-size": 4,
            "max-length": 64,
            "learning-rate": 1e-2,
            "peft.rank": 4,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return cli.main(["sft", *args, *map(str, flags)])

    return run

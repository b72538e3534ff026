"""`trainjax continual`: the matrix of scores, its resumption, every method by its name, what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests import toy
from trainjax import cli, continual, models
from trainjax.evals import forgetting
from trainjax.recipes import continual as recipe

TASKS = ("letters", "digits", "signs")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks, and held-out rows of them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, answer in zip(TASKS, ("abc", "123", "+-*"), strict=True):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {number}"},
                    {"role": "assistant", "content": answer[: 1 + number % 3]},
                ]
            }
            for number in range(12)
        ]
        toy.write_jsonl(folder / f"{name}.jsonl", rows[:8])
        toy.write_jsonl(folder / f"{name}.test.jsonl", rows[8:])
    return folder


@pytest.fixture(scope="module")
def run_continual(model, tasks):
    """Runs `trainjax continual` on the toy and returns the exit status; flags may be overridden."""

    def run(*flags, names=TASKS[:2], **changes):
        settings = {
            "model": model,
            "steps": 2,
            "batch-size": 4,
            "max-length": 64,
            "learning-rate": 1e-2,
            "peft.rank": 2,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        args += ["--tasks", *(str(tasks / f"{name}.jsonl") for name in names)]
        return cli.main(["continual", *args, *map(str, flags)])

    return run


@pytest.fixture
def run(run_continual, tmp_path):
    """`run_continual` into the test's own folder, `run`."""
    return lambda *flags, **changes: run_continual(*flags, **({"out": tmp_path / "run"} | changes))


def held_out(tasks: Path, names=TASKS):
    return ["--eval-tasks", *(str(tasks / f"{name}.test.jsonl") for name in names)]


WHOLE = {"names": TASKS, "method__name": "ewc", "method__samples": 4, "exact_match": 2}


@pytest.fixture(scope="module")
def finished(run_continual, tasks, tmp_path_factory):
    """A finished run of EWC over three tasks, with exact match."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run_continual(*held_out(tasks), "--max-new-tokens", 4, out=out, **WHOLE) == 0
    return out


def result(out: Path):
    return json.loads((out / "forgetting.json").read_text())


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_the_matrix_its_picture_and_the_adapter(finished):
    found = result(finished)
    assert found["tasks"] == found["stages"] == list(TASKS)
    assert found["method"]["name"] == "ewc"
    assert found["scores"].keys() == {"loss", "mean_token_accuracy", "exact_match"}
    for name, matrix in found["scores"].items():
        assert np.shape(matrix) == (3, 3), name
        assert np.shape(found["untrained"][name]) == (3,), name
    assert (finished / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "adapter" / "adapter_model.safetensors").is_file()


def test_records_say_their_stage_and_count_their_steps_through(finished):
    records = toy.trace(finished)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in records] == [0, 0, 1, 1, 2, 2]
    penalties = [record["ewc"] for record in records]
    assert penalties[:3] == [0, 0, 0]  # nothing to keep, then no way from the anchor yet
    assert min(penalties[3], penalties[5]) > 0


def test_settings_written_by_a_run_are_read_back(finished):
    found = cli.parse(recipe.Config, ["--config", str(finished / "config.yaml")], prog="continual")
    assert [Path(source).stem for source in found.tasks] == list(TASKS)
    assert (found.method.samples, found.exact_match, found.out) == (4, 2, finished)


def test_learning_a_task_lowers_its_held_out_loss(finished):
    found = result(finished)
    loss, before = np.asarray(found["scores"]["loss"]), np.asarray(found["untrained"]["loss"])
    earlier = np.vstack([before, loss])
    assert all(loss[task, task] < earlier[task, task] for task in range(3))


def test_measures_are_those_of_the_matrix(run, tmp_path, tasks, capsys):
    assert run(*held_out(tasks, TASKS[:2]), method__name="sequential") == 0
    found = result(tmp_path / "run")
    assert found["score"] == "mean_token_accuracy"
    matrix = np.asarray(found["scores"]["mean_token_accuracy"])
    untrained = np.asarray(found["untrained"]["mean_token_accuracy"])
    assert found["measures"] == forgetting(matrix, untrained)._asdict()
    said = capsys.readouterr().out
    assert "sequential: mean token accuracy" in said
    assert "after digits" in said
    assert "retention" in said


def test_scores_of_the_saved_adapter_are_those_of_the_last_stage(finished, model, tasks):
    tuned = models.load(model, adapter=finished / "adapter")
    assert held_out_loss(tuned, tasks) == pytest.approx(result(finished)["scores"]["loss"][-1][2])


def held_out_loss(model, tasks: Path, name: str = TASKS[2]) -> float:
    """The loss of the held-out rows, by way of the library."""
    from trainjax import data, losses
    from trainjax.policies import policy

    examples = data.encode(data.read(tasks / f"{name}.test.jsonl"), model.tokenizer, 64)
    (batch,) = data.one_epoch(examples, data.Plan(4, 64))
    return float(losses.sft(policy(model))(model.params, batch)[0])


# --- methods -------------------------------------------------------------------------------------


def test_every_method_of_the_library_has_a_name_here():
    found = inspect.getmembers(continual, inspect.isfunction)
    names = {n for n, f in found if inspect.signature(f).return_annotation == "Method"}
    assert names == set(recipe.METHODS)


@pytest.mark.parametrize("name", ["si", "replay"])
def test_methods_that_change_optimizer_or_rows_run_through_two_tasks(run, tmp_path, name):
    assert run(method__name=name) == 0
    assert np.shape(result(tmp_path / "run")["scores"]["loss"]) == (2, 2)


def test_adapters_of_all_tasks_are_saved_as_one(run, tmp_path, model, tasks):
    assert run(*held_out(tasks, TASKS[:2]), method__name="o_lora", peft__alpha=8) == 0
    fields = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 16)
    tuned = models.load(model, adapter=tmp_path / "run" / "adapter")
    last = result(tmp_path / "run")["scores"]["loss"][-1]
    found = [held_out_loss(tuned, tasks, name) for name in TASKS[:2]]
    assert found == pytest.approx(last, rel=1e-5)


def test_joint_learning_is_one_stage_of_as_many_steps(run, tmp_path):
    assert run(method__name="joint") == 0
    found = result(tmp_path / "run")
    assert found["stages"] == ["letters + digits"]
    assert np.shape(found["scores"]["loss"]) == (1, 2)
    assert found["measures"].keys() == {"average"}
    assert len(toy.trace(tmp_path / "run")) == 4


def test_every_weight_may_train(run, tmp_path):
    assert run("--full", method__name="hft") == 0
    assert models.load(tmp_path / "run" / "model").config.hidden_size == 32


# --- resuming ------------------------------------------------------------------------------------


def test_a_run_stopped_in_a_task_goes_on_after_the_one_before_as_if_it_had_not_been(
    run, finished, tasks, tmp_path, monkeypatch, capsys
):
    from trainjax.train import metrics

    def stopping(steps, done=0):
        del steps, done
        tell = lambda record: record["step"] == 5 and signal.raise_signal(signal.SIGINT)  # noqa: E731
        return contextlib.nullcontext(tell)

    flags = [*held_out(tasks), "--max-new-tokens", 4]
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "progress", stopping)
        assert run(*flags, **WHOLE) == 128 + signal.SIGINT
    assert np.shape(result(tmp_path / "run")["scores"]["loss"]) == (2, 3)
    assert run("--resume", *flags, **WHOLE) == 0
    assert "learning signs (3 of 3)" in capsys.readouterr().err.rpartition("learning digits")[2]
    assert result(tmp_path / "run") == result(finished)
    exact = lambda path: [(r["step"], r["loss"], r["ewc"]) for r in toy.trace(path)]  # noqa: E731
    assert exact(tmp_path / "run") == exact(finished)


def test_a_finished_run_is_left_as_it_is(run, finished, tasks, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run("--resume", *held_out(tasks), "--max-new-tokens", 4, **WHOLE) == 0
    for name in ("forgetting.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (finished / name).read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"method__strength": 7.0},
            "had method.strength=None, now it is 7.0; resume with the same",
        ),
        ({"names": TASKS[::-1]}, "had tasks="),
        ({"peft__rank": 3}, "was written by another configuration"),  # a Fisher for another tree
    ],
    ids=["strength", "tasks", "rank"],
)
def test_another_run_is_not_resumed(run, finished, tasks, tmp_path, capsys, changes, sentence):
    shutil.copytree(finished, tmp_path / "run")
    changes = WHOLE | changes
    flags = [*held_out(tasks, changes["names"]), "--max-new-tokens", 4]
    assert run("--resume", *flags, **changes) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"names": TASKS[:1]},
            "tasks=['letters']: forgetting is of a task that another comes after",
        ),
        ({"names": ("letters", "letters")}, "two tasks are called 'letters'; tell them apart with"),
        ({"method__name": "ewk"}, "--method.name is one of ewc, hft, joint"),
        ({"method__strength": 0}, "strength=0.0 protects nothing; give a number above 0"),
        ({"method__strength": -2}, "strength=-2.0 protects nothing; give a number above 0"),
        (
            {"method__decay": 0.5},
            "--method.decay has no meaning for ewc, which has strength, samples",
        ),
        (
            {"method__name": "joint", "method__strength": 1},
            "--method.strength has no meaning for joint, which has no coefficients",
        ),
        ({"steps": 0}, "steps=0: a task has at least one"),
    ],
)
def test_bad_settings_are_one_clear_sentence(run, capsys, changes, sentence):
    assert run(**changes) in (1, 2)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_names_of_held_out_rows_must_be_those_of_the_tasks(run, tasks, capsys):
    assert run(*held_out(tasks, TASKS[1::-1])) == 1
    said = capsys.readouterr().err
    assert "the tasks are letters, digits, and the held-out rows are of digits, letters;" in said


def test_adapters_are_needed_where_each_task_has_one(run, capsys):
    assert run("--full", method__name="o_lora") == 1
    assert "this method is of low-rank adapters" in capsys.readouterr().err


def test_exact_match_is_of_conversations(run, rows, tasks, capsys):
    flags = ["--tasks", f"letters={rows}", str(tasks / "digits.jsonl")]
    assert run(*flags, exact_match=2) == 1
    assert "rows.jsonl: exact match is of conversations" in capsys.readouterr().err

"""`--base-format`: what a run over a base in few bits leaves, and what fits with it."""

import dataclasses
import shutil

import pytest

from tests import toy


@pytest.fixture(scope="module")
def quantised(run_sft, tmp_path_factory):
    """A run of 8 steps over NF4 with checkpoints after 4 and 8."""
    run = tmp_path_factory.mktemp("quantised") / "run"
    assert run_sft("--base-format", "nf4", out=run, save_every=4) == 0
    return run


def test_a_run_over_nf4_learns_and_its_loss_is_not_that_over_the_original(quantised, finished):
    ours, theirs = toy.trace(quantised), toy.trace(finished)
    assert ours[-1]["loss"] < ours[0]["loss"]
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.05)


def test_a_stopped_run_over_nf4_goes_on_bit_by_bit(quantised, sft, tmp_path):
    shutil.copytree(quantised, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert sft("--base-format", "nf4", "--resume", save_every=4) == 0
    assert toy.exact(tmp_path / "run") == toy.exact(quantised)


def test_a_run_is_not_resumed_over_another_format(quantised, sft, tmp_path, capsys):
    shutil.copytree(quantised, tmp_path / "run")
    assert sft("--base-format", "int8", "--resume", save_every=4) == 1
    assert "had base_format='nf4', now it is 'int8'" in capsys.readouterr().err


def test_the_adapter_goes_on_the_original_and_merges_into_what_it_was_trained_on(
    quantised, model, tmp_path, capsys
):
    from trainjax import cli, models

    adapter = ["--model", str(model), "--adapter", str(quantised / "adapter")]
    assert cli.main(["generate", *adapter, "--prompt", "a", "--base-format", "nf4"]) == 0
    assert cli.main(["generate", *adapter, "--prompt", "a"]) == 0
    assert cli.main(["merge", *adapter, f"--out={tmp_path / 'a'}", "--base-format", "nf4"]) == 0
    assert cli.main(["merge", *adapter, f"--out={tmp_path / 'b'}"]) == 0
    marks = {models.load(tmp_path / name).fingerprint for name in "ab"}
    assert len(marks) == 2


def test_weights_cannot_both_train_and_be_frozen_in_few_bits(sft, capsys):
    assert sft("--full", "--base-format", "nf4") == 1
    assert (
        "--full trains every weight, and --base-format nf4 freezes them" in capsys.readouterr().err
    )


@pytest.mark.parametrize("job", ["sft", "dpo", "kto", "reward", "continual", "generate", "chat"])
def test_every_job_with_a_base_has_the_flag(job):
    from importlib import import_module

    config = import_module(f"trainjax.recipes.{job}").Config
    assert "base_format" in {field.name for field in dataclasses.fields(config)}

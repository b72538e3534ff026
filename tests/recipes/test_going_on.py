"""Training that goes on: with an adapter of an earlier run or of PEFT, and past a run's own end."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from tests import toy
from trainjax import cli, models
from trainjax.recipes import reward


@pytest.fixture(scope="module")
def first(run_sft, tmp_path_factory):
    """A run of 3 steps with a constant rate, rank 2 and saved notes of what made it."""
    out = tmp_path_factory.mktemp("first") / "run"
    settings = {"steps": 3, "schedule__name": "constant", "warmup": 0, "peft__rank": 2}
    assert run_sft("--peft.rslora", out=out, eval_data=None, **settings) == 0
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file with 8 pairs."""
    rows = [{"prompt": f"{i}", "chosen": "ab" * (i % 3 + 1), "rejected": "x"} for i in range(8)]
    return toy.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def go_on(job, model, data, out, *flags):
    settings = ["--model", model, "--data", data, "--out", out, "--batch-size", 4]
    settings += ["--max-length", 64, "--steps", 2, "--learning-rate", 1e-2, *flags]
    return cli.main([job, *map(str, settings)])


def refused(capsys, status):
    """The sentence in which a command was refused."""
    assert status == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


class TestMoreSteps:
    def test_a_constant_rate_goes_on_as_if_the_run_had_been_longer(
        self, run_sft, first, tmp_path, capsys
    ):
        constant = {"schedule__name": "constant", "warmup": 0, "peft__rank": 2}
        assert run_sft("--peft.rslora", out=tmp_path / "whole", steps=5, **constant) == 0
        longer = shutil.copytree(first, tmp_path / "longer")
        flags = ("--peft.rslora", "--resume")
        assert run_sft(*flags, out=longer, steps=5, **constant) == 0
        assert toy.exact(longer) == toy.exact(tmp_path / "whole")
        starts = json.loads((longer / "run.json").read_text())
        assert len(starts) == 2
        assert starts[0]["id"] == starts[1]["id"]
        assert starts[0]["versions"].keys() >= {"python", "jax", "trainjax"}
        said = capsys.readouterr().err.splitlines()
        assert f"loading {yaml.safe_load((first / 'config.yaml').read_text())['model']} ..." in said
        assert said[-2].startswith("done, loss ")
        assert said[-2].endswith(f"the adapter is in {longer}/adapter")
        assert said[-1].startswith("next: trainjax generate --model ")

    def test_a_rate_that_knows_the_end_does_not(self, sft, finished, capsys):
        sentence = refused(capsys, sft("--resume", steps=12))
        assert (
            "had steps=8, now it is 12, and the rate of step 2, which is done, was 0.00" in sentence
        )

    def test_other_rows_are_told_in_words(self, sft, finished, tmp_path, capsys):
        other = toy.write_jsonl(tmp_path / "other.jsonl", toy.rows(25))
        sentence = refused(capsys, sft("--resume", data=other))
        assert "had data=24 examples, " in sentence
        assert "now it is 25 examples, " in sentence
        assert f"of {other} (fingerprint " in sentence


class TestAdapter:
    def test_preferences_begin_at_it_and_it_is_their_reference(self, model, first, pairs, tmp_path):
        out = tmp_path / "dpo"
        assert go_on("dpo", model, pairs, out, "--adapter", first, "--warmup", 0) == 0
        begin, later = toy.trace(out)
        assert abs(begin["rewards/margins"]) < 1e-6
        assert abs(later["rewards/margins"]) > 1e-4
        fields = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (fields["r"], fields["use_rslora"]) == (2, True)
        assert yaml.safe_load((out / "config.yaml").read_text())["adapter"] == str(first)
        shutil.copytree(first / "adapter", tmp_path / "same")
        flags = ("--adapter", tmp_path / "same", "--warmup", 0, "--resume")
        assert go_on("dpo", model, pairs, out, *flags) == 0
        assert toy.trace(out) == [begin, later]

    def test_its_settings_are_its_own(self, model, rows, first, tmp_path, capsys):
        flags = ("--adapter", first, "--peft.rank", 8)
        sentence = refused(capsys, go_on("sft", model, rows, tmp_path / "run", *flags))
        assert f"--peft.rank 8: the adapter in {first} has rank=2" in sentence
        sentence = refused(
            capsys, go_on("sft", model, rows, tmp_path / "run", "--adapter", first, "--full")
        )
        assert "--full trains every weight, and --adapter" in sentence

    def test_another_base_is_refused(self, rows, first, tmp_path, capsys):
        other = toy.model_folder(tmp_path / "other", seed=1)
        sentence = refused(capsys, go_on("sft", other, rows, tmp_path / "run", "--adapter", first))
        assert "was trained on another base" in sentence

    def test_a_reward_model_may_begin_at_it(self, model, first, tmp_path):
        config = reward.Config(model=str(model), data="pairs", out=tmp_path, adapter=first)
        base = models.load(model)
        params = reward._first_params(config, reward._start(config, base))
        jax.tree.map(
            np.testing.assert_array_equal, params["body"], models.load_adapter(first, base)[1]
        )
        assert params["score"]["kernel"].shape == (32, 1)

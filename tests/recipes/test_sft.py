import contextlib
import json
import shutil
import signal

import numpy as np
import pytest
import yaml

from tests import toy

FIELDS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "seconds",
}


def test_a_run_leaves_metrics_adapter_checkpoints_and_settings(finished):
    records = toy.trace(finished)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(record.keys() >= FIELDS for record in records)
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"3", "6", "8"}
    assert yaml.safe_load((finished / "config.yaml").read_text())["peft"]["rank"] == 4


def test_num_tokens_counts_the_real_tokens_seen(finished, rows):
    from trainjax import data

    examples = data.encode(data.read(rows), toy.tokenizer(), 64)
    batches = len(data.Plan(4, 64).epoch(examples, 0))  # one row holds several examples
    assert toy.trace(finished)[batches - 1]["num_tokens"] == len(examples.tokens)


def test_evaluation_reports_held_out_loss(finished):
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    evals = [record for record in map(json.loads, lines) if "eval_loss" in record]
    assert [record["step"] for record in evals] == [4, 8]
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"]


def test_scalars_go_to_tensorboard_where_asked(finished):
    assert list((finished / "tensorboard").glob("events.*"))


def test_settings_written_by_a_run_repeat_it(finished, tmp_path):
    from trainjax import cli

    again = tmp_path / "again"
    assert cli.main(["sft", f"--config={finished / 'config.yaml'}", f"--out={again}"]) == 0
    assert toy.exact(again) == toy.exact(finished)


def test_the_adapter_of_a_run_changes_the_model(finished, model):
    from trainjax import models

    base, tuned = models.load(model), models.load(model, adapter=finished / "adapter")
    tokens = np.arange(12).reshape(1, 12)
    assert np.abs(base.logits(tokens) - tuned.logits(tokens)).max() > 1e-3


def test_full_training_lowers_the_loss_and_writes_a_model_and_is_left_as_it_is(sft, tmp_path):
    from trainjax import models

    assert sft("--full", steps=30) == 0
    losses = [record["loss"] for record in toy.trace(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert models.load(tmp_path / "run" / "model").config.hidden_size == 32
    assert sft("--full", "--resume", steps=30) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "mesh__fsdp": 2, "mesh__data": 2, "packing": "none"},
        {
            "accumulate": 2,
            "remat": "full",
            "peft__dropout": 0.1,
            "mesh__fsdp": 1,
            "mesh__tensor": 4,
        },
    ],
    ids=["narrow and unpacked", "in parts and with dropout"],
)
def test_variants_run_and_learn(sft, tmp_path, changes):
    assert sft(**changes) == 0
    records = toy.trace(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]


def test_rows_that_are_cut_left_out_or_without_a_target_are_counted(sft, capsys):
    assert sft(max_length=32, learning_rate=-1) == 1  # it ends after the rows were read
    said = capsys.readouterr().err
    assert " cut to the longest length" in said
    assert " left out: no completion within that length" in said


class TestResuming:
    def test_a_resumed_run_has_the_trace_of_an_uninterrupted_one(self, sft, finished):
        whole = toy.exact(finished)
        shutil.rmtree(finished / "checkpoints" / "8")  # as if killed after step 6
        assert sft("--resume", save_every=3) == 0
        assert toy.exact(finished) == whole

    def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_trace(
        self, sft, finished, capsys, caplog
    ):
        whole = toy.exact(finished)
        (finished / "checkpoints" / "8" / "manifest.json").write_text("")
        assert sft("--resume", save_every=3) == 0
        assert f"{finished / 'checkpoints' / '8'} is damaged" in caplog.text
        assert "resuming after step 6" in capsys.readouterr().err
        assert toy.exact(finished) == whole

    def test_a_finished_run_is_left_as_it_is(self, sft, finished):
        whole = (finished / "metrics.jsonl").read_text()
        assert sft("--resume", save_every=3) == 0
        assert (finished / "metrics.jsonl").read_text() == whole

    def test_without_a_checkpoint_it_starts_from_the_beginning(self, sft, finished, capsys):
        whole = toy.exact(finished)
        shutil.rmtree(finished / "checkpoints")
        assert sft("--resume") == 0
        assert "starting from the beginning" in capsys.readouterr().err
        assert toy.exact(finished) == whole

    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
    def test_a_signal_saves_and_exits_and_the_run_can_be_resumed(
        self, sft, finished, tmp_path, sent, capsys, monkeypatch
    ):
        from trainjax.train import metrics

        @contextlib.contextmanager
        def sending(steps, done=0):
            del steps, done
            yield lambda record: record["step"] == 3 and signal.raise_signal(sent)

        with monkeypatch.context() as patch:
            patch.setattr(metrics, "progress", sending)
            assert sft(out=tmp_path / "stopped") == 128 + sent
        said = capsys.readouterr().err
        assert f"stopped by {sent.name} after step 4; continue it with --resume" in said
        assert (tmp_path / "stopped" / "checkpoints" / "4").is_dir()
        assert sft("--resume", out=tmp_path / "stopped") == 0
        assert toy.exact(tmp_path / "stopped") == toy.exact(finished)


def test_an_infinite_loss_names_step_rows_and_checkpoint(sft, tmp_path, capsys):
    assert sft(learning_rate=1e30, warmup=0, save_every=1) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite, on rows [" in said
    assert f"the newest checkpoint is {tmp_path}/run/checkpoints/" in said


def test_without_wandb_the_missing_package_is_named(sft, capsys):
    assert sft(wandb="project") == 1
    assert "logging to wandb needs the package: pip install wandb" in capsys.readouterr().err

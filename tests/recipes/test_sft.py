import json
import signal
import threading
import time

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


def trace(run):
    """The records of the steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def test_a_run_leaves_metrics_adapter_checkpoints_and_settings(sft, tmp_path):
    assert sft() == 0
    run = tmp_path / "run"
    records = trace(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record.keys() >= FIELDS for record in records)
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (run / "checkpoints" / "4").is_dir()
    assert yaml.safe_load((run / "config.yaml").read_text())["peft"]["rank"] == 4


def test_the_loss_falls(sft, tmp_path):
    sft("--full", steps=30)
    losses = [record["loss"] for record in trace(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_num_tokens_counts_the_real_tokens_seen(sft, tmp_path, rows):
    from trainjax import data

    sft(steps=6)  # one row of several examples each: an epoch has 6 batches of 4 rows
    examples = data.encode(data.read(rows), toy.tokenizer(), 64)
    batches = len(data.Plan(4, 64).epoch(examples, 0))
    records = trace(tmp_path / "run")
    assert records[batches - 1]["num_tokens"] == len(examples.tokens)


def test_settings_written_by_a_run_repeat_it(sft, tmp_path):
    from trainjax import cli

    sft()
    again = tmp_path / "again"
    assert cli.main(["sft", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(again)]) == 0
    assert [r["loss"] for r in trace(again)] == [r["loss"] for r in trace(tmp_path / "run")]


def test_evaluation_reports_held_out_loss(sft, tmp_path, rows):
    sft(eval_data=rows, eval_every=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evals = [record for record in map(json.loads, lines) if "eval_loss" in record]
    assert [record["step"] for record in evals] == [2, 4]
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "none"},
        {"dtype": "bfloat16"},
        {"accumulate": 2, "remat": "full"},
        {"mesh__fsdp": 2, "mesh__data": 2},
        {"peft__dropout": 0.1, "mesh__fsdp": 1, "mesh__tensor": 4},
    ],
    ids=str,
)
def test_variants_run_and_learn(sft, tmp_path, changes):
    assert sft(steps=8, **changes) == 0
    records = trace(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]


def test_full_training_writes_a_model(sft, tmp_path):
    from trainjax import models

    assert sft("--full", learning_rate=1e-3) == 0
    assert models.load(tmp_path / "run" / "model").config.hidden_size == 32


def test_the_adapter_of_a_run_changes_the_model(sft, tmp_path, model):
    from trainjax import models

    sft()
    base, tuned = models.load(model), models.load(model, adapter=tmp_path / "run" / "adapter")
    tokens = np.arange(12).reshape(1, 12)
    assert np.abs(base.logits(tokens) - tuned.logits(tokens)).max() > 1e-3


def test_a_resumed_run_has_the_trace_of_an_uninterrupted_one(sft, tmp_path):
    sft(out=tmp_path / "whole", steps=9, save_every=4)
    sft(steps=9, save_every=4)
    (tmp_path / "run" / "checkpoints" / "9").rename(tmp_path / "gone")  # as if killed after step 8
    assert sft("--resume", steps=9, save_every=4) == 0
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy")
    part = lambda run: [[record[key] for key in keys] for record in trace(run)]  # noqa: E731
    assert part(tmp_path / "run") == part(tmp_path / "whole")


def test_resume_without_a_checkpoint_starts_from_the_beginning(sft, capsys):
    assert sft("--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_saves_and_exits_and_the_run_can_be_resumed(sft, tmp_path, sent, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def send():
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.01)
        signal.raise_signal(sent)

    threading.Thread(target=send).start()
    assert sft(steps=2000) == 128 + sent
    assert f"stopped by {sent.name} after step" in capsys.readouterr().err
    done = trace(tmp_path / "run")[-1]["step"]
    assert done < 2000
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()


def test_an_infinite_loss_names_step_rows_and_checkpoint(sft, tmp_path, capsys):
    assert sft(learning_rate=1e30, warmup=0, steps=50, save_every=1) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite, on rows [" in said
    assert f"the newest checkpoint is {tmp_path}/run/checkpoints/" in said


class TestBadInput:
    """Each of these is one clear sentence and a non-zero exit."""

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
            ({"model": "nowhere"}, "there is no model 'nowhere'"),
            ({"model": "smollm2-135m-instrct"}, "did you mean 'smollm2-135m-instruct'?"),
            ({"peft__rank": 0}, "rank=0 for layers/attention/"),
            ({"peft__rank": 99}, "rank=99 is above the sides of layers/attention/"),
            ({"peft__target": "q_proj"}, "no parameter's name matches 'q_proj'; the names are layers/"),
            ({"peft__target": "("}, "'(' is not a regular expression"),
            ({"peft__dropout": 1.5}, "dropout=1.5 is not a probability"),
            ({"accumulate": 3}, "accumulate=3 does not divide a batch of 4 rows"),
            ({"batch_size": 3}, "batch_size=3 is not divisible by the mesh's 4 row shards"),
            ({"mesh__fsdp": 3}, "mesh data=1 x fsdp=3 x tensor=1 does not multiply to the 4 devices"),
            ({"learning_rate": -1}, "learning_rate=-1.0 is negative"),
            ({"warmup": 9}, "warmup=9.0 is not within the run's 4 steps"),
            ({"max_length": 8}, "none of the 24 rows has a token to train on"),
            ({"too_long": "error", "max_length": 40}, "tokens are more than max_length=40"),
            ({"steps": 0}, "steps=0"),
            ({"out": "/dev/null/run"}, "/dev/null"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_settings(self, sft, capsys, changes, sentence):
        assert sft(**changes) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert sentence in said[-1]
        assert said[-1].startswith("error: ")

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ('{"prompt": "a", "completion": "b"}\n{"prompt" "b"}\n', "line 2: not valid JSON"),
            ('{"question": "a"}\n', "the columns are question; accepted are: messages; prompt + "),
            ("", "holds no rows"),
            ('{"prompt": "a", "completion": ""}\n' * 3, None),
            ('{"messages": [{"role": "robot", "content": "a"}]}\n', "unknown role robot"),
        ],
        ids=["broken JSON", "columns", "empty", "empty completions", "role"],
    )
    def test_data(self, sft, tmp_path, capsys, content, sentence):
        (tmp_path / "bad.jsonl").write_text(content)
        status = sft(data=tmp_path / "bad.jsonl", steps=1)
        if sentence is None:  # an empty answer still teaches to end the turn
            assert status == 0
        else:
            assert status == 1
            assert sentence in capsys.readouterr().err

    def test_a_folder_with_another_run(self, sft, capsys):
        sft()
        assert sft() == 1
        assert "holds another run; continue it with --resume" in capsys.readouterr().err

    def test_resuming_with_other_settings(self, sft, capsys):
        sft()
        assert sft("--resume", learning_rate=5e-3) == 1
        assert "had learning_rate=0.01, now it is 0.005" in capsys.readouterr().err

    def test_resuming_on_other_data(self, sft, tmp_path, capsys):
        sft()
        other = toy.write_jsonl(tmp_path / "other.jsonl", toy.rows(25))
        assert sft("--resume", data=other) == 1
        assert "had data=" in capsys.readouterr().err

    def test_an_adapter_for_another_base(self, sft, tmp_path, capsys):
        from trainjax import cli

        sft()
        other = toy.model_folder(tmp_path / "other", seed=1)
        args = ["--model", str(other), "--adapter", str(tmp_path / "run" / "adapter")]
        assert cli.main(["merge", *args, "--out", str(tmp_path / "merged")]) == 1
        assert "was trained on another base" in capsys.readouterr().err
        assert cli.main(["merge", *args, "--out", str(tmp_path / "merged"), "--other-base"]) == 0

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model_type": "mamba"}, "model_type='mamba' is not supported; llama, mistral, qwen2 are"),
            ({"vocab_size": 300}, "model.embed_tokens.weight is (259, 32); config.json asks for (300, 32)"),
            ({"num_hidden_layers": 3}, "the checkpoint has no 'model.layers.2."),
            ({"num_hidden_layers": 1}, "the checkpoint holds 'model.layers.1."),
            ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not supported"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_model_that_does_not_fit_its_config(self, sft, model, tmp_path, capsys, changes, sentence):
        import shutil

        broken = tmp_path / "broken"
        shutil.copytree(model, broken)
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | changes))
        assert sft(model=broken) == 1
        assert sentence in capsys.readouterr().err

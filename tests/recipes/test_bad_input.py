"""Whatever is wrong with what a user gives: one sentence, a status that is not 0, and nothing lost."""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import toy
from trainjax import retries

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")


@pytest.fixture
def said(capsys):
    """The one line in which the failure was explained."""

    def last() -> str:
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert errors == captured.err.strip().splitlines()[-1:]
        return errors[0]

    return last


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"data": __file__}, "test_bad_input.py: cannot tell its format; a file ends in .jsonl"),
        ({"eval-data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"model": "nowhere"}, "there is no model 'nowhere'"),
        ({"model": "smollm2-135m-instrct"}, "did you mean 'smollm2-135m-instruct'?"),
        ({"model": __file__}, "is a file, but not a .gguf; give a model's folder or a .gguf file"),
        ({"peft__rank": 0}, "rank=0 for layers/attention/"),
        ({"peft__rank": 99}, "rank=99 is above the sides of layers/attention/"),
        ({"peft__target": "q_prj"}, "no parameter's name matches 'q_prj'; the names are "),
        ({"peft__target": "("}, "'(' is not a regular expression"),
        ({"peft__dropout": 1.5}, "dropout=1.5 is not a probability"),
        ({"accumulate": 3}, "accumulate=3 does not divide a batch of 4 rows"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"batch_size": 3}, "batch_size=3 is not divisible by the mesh's 4 row shards"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mesh__fsdp": 3}, "mesh data=1 x fsdp=3 x tensor=1 does not multiply to the 4 devices"),
        ({"learning_rate": -1}, "learning_rate=-1.0 is negative"),
        ({"warmup": 9}, "warmup=9.0 is not within the run's 8 steps"),
        ({"max_length": 8}, "none of the 24 rows has a token to train on"),
        ({"max_length": 0}, "max_length=0"),
        ({"too_long": "error", "max_length": 40}, "tokens are more than max_length=40"),
        ({"steps": 0}, "steps=0"),
        ({"out": "/dev/null/run"}, "/dev/null"),
        ({"out": "/proc/run"}, "/proc/run"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings(sft, said, changes, sentence):
    assert sft(**changes) == 1
    assert sentence in said()


class TestData:
    @pytest.mark.parametrize("option", ["data", "eval_data"])
    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ('{"prompt": "a", "completion": "b"}\n{"prompt" "b"}\n', ", line 2: not valid JSON"),
            (
                '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "com',
                ", line 2: not valid JSON",
            ),
            ("[1]\n", ", line 1: a row is an object, this is a list"),
            (
                '{"question": "a"}\n',
                ": row 0: the columns are question; accepted are: messages; prompt + ",
            ),
            (
                '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}',
                ": row 1: the column 'completion' is ",
            ),
            ("", " holds no rows"),
            ('{"messages": [{"role": "robot", "content": "a"}]}\n', "unknown role robot"),
            (
                '{"messages": [{"role": "user", "content": "a"}]}\n',
                "none of the 1 rows has a token to train",
            ),
            (
                '{"messages": "a"}\n',
                "row 0: messages are a list, not empty, of objects with `role` and",
            ),
            ('{"prompt": 1, "completion": 2}\n', "row 0: "),
        ],
        ids=[
            "broken JSON",
            "half a line",
            "not an object",
            "columns",
            "a column missing later",
            "empty",
            "role",
            "no answer",
            "no messages",
            "numbers",
        ],
    )
    def test_rows(self, sft, tmp_path, said, option, content, sentence):
        (tmp_path / "bad.jsonl").write_text(content)
        assert sft(**{option: tmp_path / "bad.jsonl"}) == 1
        told = said()
        assert sentence in told
        assert f"{tmp_path}/bad.jsonl" in told

    @pytest.mark.parametrize("option", ["data", "eval_data"])
    def test_a_folder_that_is_no_dataset(self, sft, tmp_path, said, option):
        assert sft(**{option: tmp_path}) == 1
        assert str(tmp_path) in said()

    def test_a_file_whose_reading_fails(self, sft, tmp_path, said, monkeypatch):
        monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0))
        (tmp_path / "bad.jsonl").symlink_to("/proc/self/mem")  # fails for root too
        assert sft(data=tmp_path / "bad.jsonl") == 1
        assert f"{tmp_path}/bad.jsonl cannot be read: " in said()

    @NOT_ROOT
    def test_a_file_that_may_not_be_read(self, sft, rows, tmp_path, said):
        shutil.copy(rows, tmp_path / "bad.jsonl")
        (tmp_path / "bad.jsonl").chmod(0)
        assert sft(data=tmp_path / "bad.jsonl") == 1
        assert "Permission denied" in said()

    @pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz", "bad.parquet"])
    def test_a_file_of_other_bytes(self, sft, tmp_path, said, name):
        (tmp_path / name).write_bytes(b"\x80\xff" * 40)
        assert sft(data=tmp_path / name) == 1
        assert f"{tmp_path}/{name} " in said()

    def test_half_a_compressed_file(self, sft, rows, tmp_path, said):
        whole = gzip.compress(rows.read_bytes())
        (tmp_path / "bad.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        assert sft(data=tmp_path / "bad.jsonl.gz") == 1
        assert "bad.jsonl.gz cannot be read: " in said()

    def test_an_empty_answer_still_teaches_to_end_the_turn(self, sft, tmp_path):
        empty = toy.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}] * 3)
        assert sft(data=empty) == 0


class TestModel:
    @pytest.fixture
    def broken(self, model, tmp_path):
        return Path(shutil.copytree(model, tmp_path / "broken"))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model_type": "mamba"}, "model_type='mamba' is not supported; "),
            (
                {"vocab_size": 300},
                "model.embed_tokens.weight is (259, 32); config.json asks for (300, 32)",
            ),
            ({"num_hidden_layers": 3}, "the checkpoint has no 'model.layers.2."),
            ({"num_hidden_layers": 1}, "the checkpoint holds 'model.layers.1."),
            ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
                "rope_type='yarn' is not supported",
            ),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_config_that_does_not_fit(self, sft, broken, said, changes, sentence):
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | changes))
        assert sft(model=broken) == 1
        assert sentence in said()

    def test_a_tokenizer_with_tokens_that_the_model_lacks(self, sft, tmp_path, said):
        small = toy.model_folder(tmp_path / "small", vocab_size=80)
        assert sft(model=small) == 1
        assert "gives the token " in (told := said())
        assert "vocab_size=80" in told

    def test_no_tokenizer(self, sft, broken, said):
        for file in broken.glob("tokenizer*"):
            file.unlink()
        assert sft(model=broken) == 1
        assert f"{broken} has no tokenizer" in said()

    def test_a_folder_that_is_no_model(self, sft, tmp_path, said):
        assert sft(model=tmp_path) == 1
        assert f"{tmp_path} is not a model folder: it has no config.json" in said()

    def test_a_config_that_is_not_json(self, sft, broken, said):
        (broken / "config.json").write_text("{")
        assert sft(model=broken) == 1
        assert "config.json is not valid JSON" in said()

    def test_a_truncated_safetensors_file(self, sft, broken, said):
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert sft(model=broken) == 1
        assert f"{file} is not a readable safetensors file" in said()

    def test_a_pickle_is_not_loaded(self, sft, broken, said):
        (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
        assert sft(model=broken) == 1
        assert "pytorch_model.bin is a pickle, which is never loaded" in said()

    def test_a_file_that_is_not_gguf(self, sft, tmp_path, said):
        (tmp_path / "model.gguf").write_bytes(b"no such thing" * 10)
        assert sft(model=tmp_path / "model.gguf") == 1
        assert f"{tmp_path}/model.gguf" in said()

    @pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
    def test_a_truncated_gguf_file(self, sft, tmp_path, said, kept):
        from gguf import GGUFWriter

        file = tmp_path / "model.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_block_count(2)
        writer.add_tensor("token_embd.weight", np.zeros((300, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
        assert sft(model=file) == 1
        assert f"{file}" in said()


class TestAdapter:
    @pytest.fixture
    def merge(self, tmp_path):
        from trainjax import cli

        def run(model, adapter, *flags):
            args = ["--model", model, "--adapter", adapter, "--out", tmp_path / "merged", *flags]
            return cli.main(["merge", *map(str, args)])

        return run

    def test_one_for_another_base(self, merge, finished, tmp_path, said):
        other = toy.model_folder(tmp_path / "other", seed=1)
        assert merge(other, finished / "adapter") == 1
        assert "was trained on another base" in said()
        assert not (tmp_path / "merged").exists()
        assert merge(other, finished / "adapter", "--other-base") == 0

    def test_one_for_a_base_of_another_shape(self, merge, finished, tmp_path, said):
        other = toy.model_folder(tmp_path / "other", hidden_size=64)
        assert merge(other, finished / "adapter", "--other-base") == 1
        assert "layers" in said()

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_folder_with_a_file_missing(self, merge, finished, model, said, name):
        (finished / "adapter" / name).unlink()
        assert merge(model, finished / "adapter") == 1
        assert f"no {name}" in said()

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_truncated_file(self, merge, finished, model, said, name):
        file = finished / "adapter" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert merge(model, finished / "adapter") == 1
        assert f"{finished / 'adapter'} is damaged: " in said()

    def test_a_tensor_missing(self, merge, finished, model, said):
        file = finished / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        gone = sorted(tensors)[0]
        save_file({name: value for name, value in tensors.items() if name != gone}, file)
        assert merge(model, finished / "adapter") == 1
        assert gone.rpartition(".lora")[0].removeprefix("base_model.model.") in said()

    def test_an_existing_folder_is_not_written_over(self, merge, finished, model, tmp_path, said):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "mine").touch()
        assert merge(model, finished / "adapter") == 1
        assert f"{tmp_path}/merged exists already" in said()
        assert [file.name for file in (tmp_path / "merged").iterdir()] == ["mine"]


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class TestFolderOfAnotherRun:
    def test_it_is_not_written_over(self, sft, finished, said):
        before = contents(finished)
        assert sft() == 1
        assert f"{finished} holds another run; continue it with --resume" in said()
        assert contents(finished) == before

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"learning_rate": 5e-3}, "had learning_rate=0.01, now it is 0.005"),
            ({"steps": 9}, "had steps=8, now it is 9"),
            ({"peft__alpha": 8.0}, "had peft.alpha=32.0, now it is 8.0"),
            ({"peft__rank": 8}, "had peft.rank=4, now it is 8"),
        ],
        ids=str,
    )
    def test_resuming_with_other_settings(self, sft, finished, said, changes, sentence):
        before = contents(finished)
        assert sft("--resume", **changes) == 1
        assert sentence in said()
        assert contents(finished) == before

    def test_resuming_on_other_data(self, sft, finished, tmp_path, said):
        other = toy.write_jsonl(tmp_path / "other.jsonl", toy.rows(25))
        assert sft("--resume", data=other) == 1
        assert "had data=" in said()

    def test_resuming_with_another_model(self, sft, finished, tmp_path, said):
        assert sft("--resume", model=toy.model_folder(tmp_path / "other", seed=1)) == 1
        assert "had model=" in said()

    def test_all_checkpoints_damaged(self, sft, finished, said):
        for manifest in finished.glob("checkpoints/*/manifest.json"):
            manifest.write_text("")
        before = contents(finished)
        for _ in range(2):  # the second time must not begin anew either
            assert sft("--resume") == 1
            assert f"all 3 checkpoints in {finished}/checkpoints are damaged" in said()
        assert contents(finished) == before


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
def test_a_full_disk_is_named_and_the_checkpoints_before_it_stay(sft, finished, tmp_path, said):
    whole = toy.exact(finished)
    with small_disk(tmp_path / "disk", "8m") as disk:
        run = shutil.copytree(finished, disk / "run")
        for step in (6, 8):
            shutil.rmtree(run / "checkpoints" / str(step))
        free = shutil.disk_usage(disk).free
        (disk / "filling").write_bytes(b"0" * (free - 2**17))
        assert sft("--resume", out=run, save_every=3) == 1
        assert "No space left on device" in said()
        (disk / "filling").unlink()
        assert sft("--resume", out=run, save_every=3) == 0
        assert toy.exact(run) == whole

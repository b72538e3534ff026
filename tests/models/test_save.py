"""Saving: what was loaded is written back bit by bit, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from tests import families, helpers
from trainjax import tree
from trainjax.io import folder as folders
from trainjax.models import load, save_model
from trainjax.peft import lora


def assert_equal_files(one: Path, other: Path) -> None:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert tensor.tobytes() == second[name].tobytes(), name


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_loaded_model_is_saved_bit_by_bit(golden, loaded, tmp_path, name):
    save_model(tmp_path / "out", loaded(name))
    assert_equal_files(golden / name, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(golden / name)


def test_a_bf16_model_is_saved_bit_by_bit(golden, tmp_path):
    original = Path(shutil.copytree(golden / "llama_tied", tmp_path / "model"))
    tensors = load_file(original / "model.safetensors")
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    save_file(half, original / "model.safetensors")
    save_model(tmp_path / "out", load(original))
    assert_equal_files(original, tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_a_model_over_a_mesh_is_saved_whole(golden, tmp_path):
    name = "llama_biased_llama3"
    save_model(tmp_path / "out", load(golden / name, mesh=helpers.mesh_of(1, 2, 2)))
    assert_equal_files(golden / name, tmp_path / "out")


def test_other_params_are_saved_in_their_own_dtype(loaded, tmp_path):
    model = loaded("llama_tied")
    save_model(tmp_path / "out", model, tree.cast(model.params, jnp.float16))
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    assert load(tmp_path / "out").params["norm"]["scale"].dtype == jnp.float16


def test_an_attached_adapter_must_be_merged_first(loaded, tmp_path):
    model = loaded("llama_tied")
    method = lora(rank=2, target="query")
    attached = method.attach(model.params, method.init(jax.random.key(0), model.params))
    with pytest.raises(ValueError, match="kernel is a Lora, not an array; merge the adapter first"):
        save_model(tmp_path / "out", model, attached)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_over(loaded, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; give the name of a new folder"):
        save_model(tmp_path, loaded("llama_tied"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_nothing_behind(loaded, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "out", loaded("llama_tied"))
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_written_into(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", loaded("llama_tied"))
    assert (tmp_path / "out" / "model.safetensors").is_file()

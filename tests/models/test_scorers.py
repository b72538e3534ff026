"""Reward models on disk: what is written comes back, and what cannot score or generate is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import trainjax as tj
from tests import helpers, toy
from trainjax.models import load, load_adapter, load_scorer, save_adapter, save_model, save_scorer
from trainjax.peft import lora

LORA = lora(rank=2, alpha=4.0, target="attention|mlp")


def trained(model, method, objectives: int = 1):
    """A scorer's params, far from their beginning."""
    params = tj.init_scorer(jax.random.key(0), model, method, objectives)
    if method is not None:
        params["body"] = helpers.trained(method, model.params)
    return params | {"score": helpers.randomised(params["score"])}


def fields(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


NAMES = pytest.mark.parametrize("name", ["llama_grouped", "llama_tied", "qwen2"])


@NAMES
def test_a_whole_reward_model_comes_back_bit_by_bit(loaded, tmp_path, name):
    model = loaded(name)
    params = trained(model, None)
    save_scorer(tmp_path / "out", model, None, params)
    _, method, found = load_scorer(tmp_path / "out")
    assert method is None
    jax.tree.map(np.testing.assert_array_equal, found, params)


@NAMES
def test_a_reward_models_folder_is_a_sequence_classifiers(loaded, tmp_path, name):
    model = loaded(name)
    save_scorer(tmp_path / "out", model, None, trained(model, None))
    config, before = fields(tmp_path / "out", "config.json"), dict(model.hf)
    family = before["architectures"][0].removesuffix("ForCausalLM")
    assert config["architectures"] == [f"{family}ForSequenceClassification"]
    assert (config["id2label"], config["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert config["num_labels"] == 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["score.weight"].shape == (1, model.config.hidden_size)
    assert "lm_head.weight" not in tensors


def test_padding_is_a_token_that_ends_no_text(tmp_path):
    """The toy's padding is its end of a turn: transformers would take that for padding."""
    model = load(toy.model_folder(tmp_path / "base"))
    save_scorer(tmp_path / "out", model, None, trained(model, None))
    again, _, _ = load_scorer(tmp_path / "out")
    assert model.tokenizer.pad_token == "<|im_end|>"
    assert again.tokenizer.pad_token == "<|endoftext|>"
    assert fields(tmp_path / "out", "config.json")["pad_token_id"] == again.tokenizer.pad_token_id


def test_several_objectives_are_as_many_labels(loaded, tmp_path):
    model = loaded("llama_tied")
    params = trained(model, None, objectives=3)
    save_scorer(tmp_path / "out", model, None, params)
    assert len(fields(tmp_path / "out", "config.json")["id2label"]) == 3
    jax.tree.map(np.testing.assert_array_equal, load_scorer(tmp_path / "out")[2], params)


def test_a_reward_models_adapter_comes_back_bit_by_bit(golden, loaded, tmp_path):
    model = loaded("llama_grouped")
    params = trained(model, LORA)
    save_scorer(tmp_path, model, LORA, params)
    config = fields(tmp_path, "adapter_config.json")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    _, method, found = load_scorer(golden / "llama_grouped", adapter=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    merged = method.merge(model.params, found["body"])
    jax.tree.map(np.testing.assert_array_equal, merged, LORA.merge(model.params, params["body"]))


def test_an_adapter_goes_on_a_reward_model_too(loaded, tmp_path):
    """Its own head is the one that scores."""
    save_scorer(tmp_path / "base", model := loaded("llama_grouped"), None, trained(model, None))
    base, _, _ = load_scorer(tmp_path / "base")
    params = trained(base, LORA)
    save_scorer(tmp_path / "adapter", base, LORA, params)
    _, _, found = load_scorer(tmp_path / "base", adapter=tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_reward_model_in_bf16_keeps_its_head_in_float32(loaded, tmp_path):
    model = loaded("llama_tied")
    save_scorer(tmp_path / "out", model, None, trained(model, None))
    base, _, found = load_scorer(tmp_path / "out", dtype=jnp.bfloat16)
    assert base.params["norm"]["scale"].dtype == jnp.bfloat16
    assert found["score"]["kernel"].dtype == jnp.float32


def test_a_reward_model_over_a_mesh_is_the_same(loaded, tmp_path):
    model = loaded("llama_grouped")
    params = trained(model, None)
    save_scorer(tmp_path / "out", model, None, params)
    _, _, found = load_scorer(tmp_path / "out", mesh=helpers.mesh_of(1, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, found, params)


# --- what does not fit --------------------------------------------------------------------------


@NAMES
def test_a_reward_model_is_no_model_that_generates(loaded, tmp_path, name):
    model = loaded(name)
    save_scorer(tmp_path / "out", model, None, trained(model, None))
    with pytest.raises(ValueError, match="is a reward model: it has score.weight.*load_scorer"):
        load(tmp_path / "out")


def test_a_model_without_a_head_that_scores_is_refused(golden):
    with pytest.raises(ValueError, match="llama_tied has no score.weight, so it cannot score"):
        load_scorer(golden / "llama_tied")


def test_adapters_of_one_kind_are_not_taken_for_the_other(golden, loaded, tmp_path):
    model = loaded("llama_tied")
    params = trained(model, LORA)
    save_adapter(tmp_path / "causal", model, LORA, params["body"])
    save_scorer(tmp_path / "scoring", model, LORA, params)
    with pytest.raises(
        ValueError, match="task_type='CAUSAL_LM' without score.weight, so it cannot"
    ):
        load_scorer(golden / "llama_tied", adapter=tmp_path / "causal")
    with pytest.raises(ValueError, match="adapter of a reward model, which scores texts"):
        load_adapter(tmp_path / "scoring", model)


def test_other_modules_that_are_said_to_be_saved_and_are_not_are_refused(golden, loaded, tmp_path):
    save_scorer(tmp_path, model := loaded("llama_tied"), LORA, trained(model, LORA))
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps(fields(tmp_path, file.name) | {"modules_to_save": ["score", "norm"]})
    )
    with pytest.raises(
        ValueError, match="modules_to_save names model.*norm, but the adapter has no"
    ):
        load_scorer(golden / "llama_tied", adapter=tmp_path)


def test_an_adapter_of_another_base_is_refused_unless_meant(golden, loaded, tmp_path):
    save_scorer(tmp_path, model := loaded("llama_grouped"), LORA, trained(model, LORA))
    base = golden / "mistral_window"
    with pytest.raises(ValueError, match="was trained on another base"):
        load_scorer(base, adapter=tmp_path)
    load_scorer(base, adapter=tmp_path, other_base=True)


def test_a_head_that_does_not_fit_is_named(loaded, tmp_path):
    save_scorer(tmp_path / "out", model := loaded("llama_tied"), None, trained(model, None))
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file) | {"score.weight": np.ones((1, 5), np.float32)}, file)
    with pytest.raises(ValueError, match=r"score.weight is \(1, 5\); .*16 wide"):
        load_scorer(tmp_path / "out")


def test_a_scorers_attached_adapter_must_be_merged_first(loaded, tmp_path):
    model = loaded("llama_tied")
    attached = LORA.attach(model.params, helpers.trained(LORA, model.params))
    with pytest.raises(ValueError, match="merge the adapter first"):
        save_model(tmp_path / "out", model, attached | trained(model, None))

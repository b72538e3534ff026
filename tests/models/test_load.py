"""Loading: the function is that of transformers, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import families, helpers
from trainjax import parallel, tree
from trainjax.io.folder import write_shards
from trainjax.models import load, random_model


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of one model's folder, to be spoiled."""
    return Path(shutil.copytree(golden / "llama_grouped", tmp_path / "model"))


def with_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensors(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_transformers(golden, loaded, name):
    expected = np.load(golden / name / "golden.npz")
    found = loaded(name).logits(expected["tokens"])
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_keep_the_dtype_of_the_file_or_get_the_one_asked_for(golden, loaded, dtype):
    model = load(golden / "llama_tied", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype or "float32")}
    assert model.fingerprint == loaded("llama_tied").fingerprint


def test_a_model_in_shards_is_the_model_in_one_file(loaded, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(folder, iter(tensors.items()), max_bytes=6000)
    assert len(list(folder.glob("model-0000*-of-0000*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, loaded("llama_grouped").params)


def test_weights_loaded_over_a_mesh_lie_by_the_rules_and_are_the_same(golden, loaded):
    mesh, name = helpers.mesh_of(1, 2, 2), "llama_biased_llama3"
    model = load(golden / name, mesh=mesh)
    params = model.params
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == parallel.shardings(params, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, loaded(name).params)
    assert model.fingerprint == loaded(name).fingerprint


def test_fingerprint_is_of_the_weights_and_not_of_their_names_and_shapes(loaded):
    """Nor of their dtype or layout, see above."""
    one, other = loaded("llama_grouped"), loaded("mistral_window")
    assert jax.tree.map(np.shape, one.params) == jax.tree.map(np.shape, other.params)
    assert one.fingerprint != other.fingerprint


def test_a_mesh_that_does_not_divide_the_heads_is_refused(folder):
    message = "tensor=4 does not divide the model's 6 attention heads; use 1, 2, 3, 6"
    with pytest.raises(ValueError, match=message):
        random_model(
            helpers.TINY | {"num_attention_heads": 6, "hidden_size": 48},
            jax.random.key(0),
            mesh=helpers.mesh_of(1, 1, 4),
        )


def test_random_model_has_the_structure_of_a_loaded_one_and_lies_by_the_rules(loaded):
    model, mesh = loaded("llama_biased_llama3"), helpers.mesh_of(1, 2, 2)
    params = random_model(model.hf, jax.random.key(0), mesh=mesh).params
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == parallel.shardings(params, mesh)


def test_with_params_leaves_the_model_as_it_was(loaded):
    model = loaded("llama_tied")
    other = model.with_params(jax.tree.map(jnp.zeros_like, model.params))
    assert tree.count(model.params) == tree.count(other.params)
    assert bool(jnp.any(model.params["norm"]["scale"] != 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not supported; .*llama.*mistral"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"hidden_size": 20},
            r"embed_tokens.weight is \(48, 16\); config.json asks for \(48, 20\)",
        ),
        ({"num_hidden_layers": 3}, r"has no 'model.layers.2.*9 tensors are missing"),
        ({"num_hidden_layers": 1}, r"holds 'model.layers.1.*llama.*9 such tensors"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}},
            "rope_type='yarn' is not supported; default, linear and llama3",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_does_not_fit_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load(with_config(folder, **changes))


def test_sliding_windows_on_some_layers_are_refused(golden, tmp_path):
    folder = Path(shutil.copytree(golden / "qwen2", tmp_path / "model"))
    with pytest.raises(ValueError, match="use_sliding_window"):
        load(with_config(folder, use_sliding_window=True))


def test_a_tensor_of_another_shape_is_named(folder):
    def swap(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is \(16, 24\).*\(24, 16\)"):
        load(with_tensors(folder, swap))


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(ValueError, match="has no 'model.norm.weight'"):
        load(with_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")))


def test_buffers_that_old_files_carry_are_passed_over(folder):
    name, before = "model.layers.0.self_attn.rotary_emb.inv_freq", load(folder).params
    with_tensors(folder, lambda tensors: tensors.update({name: np.ones(2, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, load(folder).params, before)

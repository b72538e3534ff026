"""Adapters in PEFT's format: PEFT's own load here with their values, and ours come back equal."""

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
from trainjax.io.hub import public_name
from trainjax.models import load, load_adapter, save_adapter
from trainjax.peft import lora

ADAPTERS = pytest.mark.parametrize(
    ("adapter", "family"), [(name, family) for name, (family, _) in families.ADAPTERS.items()]
)


@ADAPTERS
def test_logits_with_an_adapter_of_peft_are_those_of_peft(golden, adapter, family):
    path = golden / family / adapter
    expected = np.load(path / "golden.npz")
    found = load(golden / family, adapter=path).logits(expected["tokens"])
    helpers.assert_close({"logits": found}, {"logits": expected["logits"]}, 1e-5)


@ADAPTERS
def test_logits_with_an_adapter_of_peft_merged_are_those_of_peft(golden, loaded, adapter, family):
    path, model = golden / family / adapter, loaded(family)
    expected = np.load(path / "golden.npz")
    method, factors = load_adapter(path, model)
    merged = jax.jit(method.merge)(model.params, factors)
    found = model.with_params(merged).logits(expected["tokens"])
    helpers.assert_close({"logits": found}, {"logits": expected["logits"]}, 1e-5)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    tensors = load_file(path / "adapter_model.safetensors")
    return tensors, json.loads((path / "adapter_config.json").read_text())


@ADAPTERS
def test_an_adapter_of_peft_is_saved_with_equal_tensors(golden, loaded, tmp_path, adapter, family):
    """Layers that PEFT left out may be added, as zeros: `layers_to_transform` is not kept."""
    model = loaded(family)
    save_adapter(tmp_path, model, *load_adapter(golden / family / adapter, model))
    (found, fields), (expected, old) = read(tmp_path), read(golden / family / adapter)
    assert found.keys() >= expected.keys()
    for name, tensor in found.items():
        if name in expected:
            np.testing.assert_array_equal(tensor, expected[name])
        else:
            assert not tensor.any()
    for field in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias"):
        assert fields[field] == old[field]


@ADAPTERS
def test_a_saved_adapter_has_the_ranks_that_its_configuration_says(
    golden, loaded, tmp_path, adapter, family
):
    """PEFT makes modules of these ranks, by the patterns' exact names, and refuses other tensors."""
    model = loaded(family)
    save_adapter(tmp_path, model, *load_adapter(golden / family / adapter, model))
    tensors, fields = read(tmp_path)
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        rank = fields["rank_pattern"].get(module, fields["r"])
        assert rank == tensor.shape[0 if kind == "A.weight" else 1], name


SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3, "alpha": 4.0, "target": "head|output", "rslora": True, "dropout": 0.1},
        {
            "rank": 2,
            "target": "query|down",
            "rank_pattern": {"layers/1/.*query": 4},
            "alpha_pattern": {"layers/0/mlp": 3.0},
        },
    ],
    ids=["rslora", "patterns"],
)


@SETTINGS
def test_a_saved_adapter_comes_back_as_the_same_numbers_and_function(loaded, tmp_path, settings):
    model, method = loaded("llama_grouped"), lora(**settings)
    adapter = helpers.trained(method, model.params)
    save_adapter(tmp_path, model, method, adapter)
    other_method, other = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, other, adapter)
    jax.tree.map(
        np.testing.assert_array_equal,
        other_method.merge(model.params, other),
        method.merge(model.params, adapter),
    )


@SETTINGS
def test_merged_and_attached_are_the_same_function(golden, loaded, settings):
    model, method = loaded("llama_grouped"), lora(**settings)
    adapter = helpers.trained(method, model.params)
    tokens = np.load(golden / "llama_grouped" / "golden.npz")["tokens"]
    attached, merged, base = (
        model.with_params(params).logits(tokens)
        for params in (
            method.attach(model.params, adapter),
            method.merge(model.params, adapter),
            model.params,
        )
    )
    helpers.assert_close({"logits": attached}, {"logits": merged}, 1e-5)
    assert float(jnp.abs(merged - base).max()) > 1


def test_an_adapter_may_be_saved_over_an_earlier_one(loaded, tmp_path):
    model, method = loaded("llama_tied"), lora(rank=1, target="query")
    for seed in (0, 1):
        adapter = helpers.trained(method, model.params, seed=seed)
        save_adapter(tmp_path, model, method, adapter)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, model)[1], adapter)


def test_an_adapter_of_a_model_of_the_catalogue_names_it_as_the_hub_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert public_name("smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("owner/name") == "owner/name"
    assert public_name("model") == str(tmp_path / "model")


def test_an_adapter_says_what_it_is_of(golden, loaded, tmp_path):
    model, method = loaded("llama_tied"), lora(rank=1, target="query")
    save_adapter(tmp_path, model, method, method.init(jax.random.key(0), model.params))
    _, fields = read(tmp_path)
    assert fields["base_model_name_or_path"] == str(golden / "llama_tied")
    assert (fields["task_type"], fields["target_modules"]) == ("CAUSAL_LM", ["q_proj"])


# --- what does not fit --------------------------------------------------------------------------


@pytest.fixture
def spoiled(golden: Path, tmp_path: Path) -> Path:
    """A copy of an adapter's folder, to be spoiled; of the model `llama_grouped`."""
    return Path(shutil.copytree(golden / "llama_grouped" / "all_linear", tmp_path / "adapter"))


def with_fields(path: Path, **changes) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def with_tensors(path: Path, change) -> Path:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "sets bias='all', which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        (
            {"modules_to_save": ["lm_head"]},
            "names lm_head, but the adapter has no 'lm_head.weight'",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        (
            {"trainable_token_indices": [1]},
            r"are \[1\], but the adapter has no 'model.embed_tokens",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_parameters": ["mlp.experts.up"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"corda_config": {"corda_method": "ipm"}}, "corda_config"),
        ({"eva_config": {"rho": 2.0}}, "eva_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3"),
        ({"peft_type": "HRA"}, "peft_type='HRA' are not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_that_changes_the_function_is_refused_by_name(loaded, spoiled, fields, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(with_fields(spoiled, **fields), loaded("llama_grouped"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"base_model.model.visual.proj.lora_A.weight": np.ones((3, 16))}),
            "holds 'visual.proj.lora_A.weight', which fits no module",
        ),
        (lambda t: t.pop(Q.format("B")), "only one of lora_A and lora_B for .*0.self_attn.q_proj"),
        (
            lambda t: t.update({Q.format("A"): np.ones((3, 20), np.float32)}),
            r"0.self_attn.q_proj: lora_A \(3, 20\) and lora_B \(16, 3\) do not fit .*16 inputs",
        ),
        (
            lambda t: t.update({Q.format("A"): np.ones((2, 16), np.float32)}),
            r"lora_A \(2, 16\) and lora_B \(16, 3\) do not fit",
        ),
    ],
    ids=["unknown module", "half of a pair", "other sides", "other rank"],
)
def test_a_tensor_that_does_not_fit_is_named(loaded, spoiled, change, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(with_tensors(spoiled, change), loaded("llama_grouped"))


def test_an_adapter_of_another_base_is_refused_unless_meant(loaded, tmp_path):
    base, other = loaded("llama_grouped"), loaded("mistral_window")
    method = lora(rank=2, target="query")
    save_adapter(tmp_path, base, method, method.init(jax.random.key(0), base.params))
    with pytest.raises(ValueError, match=f"{base.fingerprint}.*{other.fingerprint}.*other_base"):
        load_adapter(tmp_path, other)
    load_adapter(tmp_path, other, other_base=True)

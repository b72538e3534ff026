"""Prompt tuning and P-tuning: how a prompt begins, what it is equal to, and its encoder."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract
from trainjax import parallel, tree
from trainjax.peft.p_tuning import p_tuning
from trainjax.peft.prompt import prompt

KEY = jax.random.key(0)
TOKENS = contract.TOKENS


@pytest.mark.parametrize("window", [None, 4])
def test_a_prompt_is_its_embeddings_before_those_of_each_text(window):
    """The same as one row of embeddings, prompt and text together, at positions 0, 1, 2, ..."""
    model, method = contract.configured(helpers.tiny(), window=window), prompt(3)
    adapter = contract.moved(method.init(KEY, model.params), std=0.5)
    attached = method.attach(model.params, adapter)
    table, first = map(
        np.asarray, (model.params["embed"]["embedding"], adapter["prompt"]["embedding"])
    )
    rows = np.stack([np.concatenate([first, table[row]]) for row in TOKENS])
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (4, 9))
    apply = jax.jit(model.module.apply)
    expected, _ = apply({"params": model.params}, rows, positions)
    found, _ = apply({"params": attached}, TOKENS, positions[:, :6])
    np.testing.assert_allclose(found, expected[:, 3:], rtol=0, atol=1e-5)


def rows_of(table, embeddings) -> list[int]:
    """Which rows of the table the embeddings are."""
    same = (np.asarray(embeddings)[:, None] == np.asarray(table)[None]).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.argmax(-1).tolist()


def test_it_begins_as_embeddings_of_the_vocabulary():
    params = helpers.tiny().params
    made = prompt(40).init(KEY, params)["prompt"]["embedding"]
    assert len(set(rows_of(params["embed"]["embedding"], made))) > 20


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [7, 9]), (3, [7, 9, 60]), (7, [7, 9, 60, 7, 9, 60, 7])]
)
def test_it_begins_as_a_text_cut_or_repeated(count, expected):
    params = helpers.tiny().params
    made = prompt(count, init_tokens=[7, 9, 60]).init(KEY, params)["prompt"]["embedding"]
    assert rows_of(params["embed"]["embedding"], made) == expected


def test_over_a_mesh_it_is_split_as_the_embeddings_are():
    params = parallel.place(helpers.tiny().params, helpers.mesh_of(1, 2, 2))
    made = prompt(3).init(KEY, params)["prompt"]["embedding"]
    assert params["embed"]["embedding"].sharding.spec[-1] == made.sharding.spec[-1] == "fsdp"


def test_the_encoder_is_two_hidden_layers_with_relu():
    """`W3 relu(W2 relu(W1 e + b1) + b2) + b3` in float64."""
    model, method = helpers.tiny(), p_tuning(3, encoder_hidden_size=5)
    adapter = contract.moved(method.init(KEY, model.params), std=0.5)
    parts = {k: np.asarray(v, np.float64) for k, v in tree.flatten(adapter["prompt"]).items()}
    x = parts["embedding"]
    for layer in ("first", "second", "third"):
        x = x @ parts[f"{layer}/kernel"] + parts[f"{layer}/bias"]
        x = np.maximum(x, 0) if layer != "third" else x
    found = method.attach(model.params, adapter)["prompt"]["embedding"]
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


def test_what_an_encoder_made_is_what_is_saved_and_comes_back_as_a_prompt(tmp_path):
    model, method = helpers.tiny(), p_tuning(3)
    adapter = contract.moved(method.init(KEY, model.params))
    tj.save_adapter(tmp_path, model, method, adapter)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "P_TUNING"
    plain, tokens = tj.load_adapter(tmp_path, model)
    assert plain is prompt(3)
    contract.equal(tokens["prompt"], dict(method.attach(model.params, adapter)["prompt"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prompt(0), "num_virtual_tokens=0: there is at least one"),
        (lambda: prompt(3, init_tokens=[]), "init_tokens is an empty text"),
        (lambda: prompt(3, init_tokens=[4, 61]), "has the id 61, and the vocabulary 61 tokens"),
        (lambda: p_tuning(3, encoder_hidden_size=0), "encoder_hidden_size=0"),
    ],
    ids=["count", "empty", "id", "size"],
)
def test_a_bad_setting_is_named_with_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(KEY, helpers.tiny().params)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_virtual_tokens", 4, r"shape \(3, 32\), and this model's has \(4, 32\)"),
        ("num_transformer_submodules", 2, "sets num_transformer_submodules=2, which is not"),
        ("modules_to_save", ["lm_head"], "names lm_head, but the adapter has no 'lm_head.weight'"),
        ("something_new", True, "sets something_new=True, which is not supported"),
    ],
)
def test_a_field_of_a_file_that_is_not_supported_is_named(tmp_path, field, value, message):
    model, method = helpers.tiny(), prompt(3)
    tj.save_adapter(tmp_path, model, method, method.init(KEY, model.params))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(tmp_path, model)


def test_numbers_of_a_file_that_are_not_finite_and_another_models_tokens_are_refused(tmp_path):
    model, method = helpers.tiny(), prompt(3)
    adapter = method.init(KEY, model.params)
    embedding = np.array(adapter["prompt"]["embedding"])
    embedding[1, 2] = np.nan
    broken = {"prompt": {"embedding": jnp.array(embedding)}}
    tj.save_adapter(tmp_path / "nan", model, method, broken)
    with pytest.raises(ValueError, match="prompt_embeddings holds NaN or infinite numbers"):
        tj.load_adapter(tmp_path / "nan", model)
    tj.save_adapter(tmp_path / "other", model, method, adapter)
    wider = jax.tree.map(lambda x: jnp.array(np.tile(x, 2)[..., :48]), model.params)
    with pytest.raises(
        ValueError, match=r"has the shape \(3, 32\), and this model's has \(3, 48\)"
    ):
        tj.load_adapter(tmp_path / "other", model.with_params(wider), other_base=True)


class TestContract(contract.Contract):
    methods = {"prompt": prompt(3), "encoder": p_tuning(3, encoder_hidden_size=6)}
    begins_as_base = False
    merges = False

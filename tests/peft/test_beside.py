"""What trains beside a method, and LoRA on both ends of a model: functions by hand, files, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import trainjax as tj
from tests import helpers
from trainjax import losses, tree
from trainjax.peft import beside, dora, lora
from trainjax.policies import policy

KEY = jax.random.key(0)
IDS = [3, 5]
TOKENS = np.asarray([[3, 4, 5, 60]])
ENDS = lora(2, target="query|embed/embedding|head/kernel")
BOTH = beside(ENDS, "^norm/")
ROWS = beside(lora(2, target="query"), None, IDS)
COPIES = beside(lora(2, target="query"), "^(embed|norm)/")


def model():
    """With tied ends, so that what changes one has to part them."""
    return helpers.tiny(num_hidden_layers=1, tie_word_embeddings=True)


def moved(adapter):
    return jax.tree.map(lambda x: x + 0.1, adapter)


def logits(params):
    return np.asarray(model().with_params(params).logits(TOKENS))


def test_it_begins_as_the_base_and_all_of_it_gets_a_gradient():
    first = BOTH.init(KEY, model().params)
    np.testing.assert_allclose(
        logits(BOTH.attach(model().params, first)), logits(model().params), atol=1e-5
    )
    loss = losses.sft(policy(model(), BOTH))
    _, gradient = helpers.loss_and_gradients(
        loss, moved(first), helpers.random_batch(rows=2, seq=8)
    )
    assert all(np.abs(part).max() > 0 for part in gradient.values())


def test_merged_it_is_the_same_function():
    adapter = moved(BOTH.init(KEY, model().params))
    expected = logits(BOTH.attach(model().params, adapter))
    found = logits(BOTH.merge(model().params, adapter))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [BOTH, ROWS, COPIES], ids=["ends", "rows", "copies"])
def test_files_bring_back_the_same_numbers(tmp_path, method):
    adapter = moved(method.init(KEY, model().params))
    tj.save_adapter(tmp_path, model(), method, adapter)
    _, again = tj.load_adapter(tmp_path, model())
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_trained_rows_are_rows_of_the_embedding_and_of_the_head_that_is_tied_to_it():
    adapter = ROWS.init(KEY, model().params)
    adapter["tokens"] = jax.tree.map(lambda rows: 2 * rows, adapter["tokens"])
    table = model().params["embed"]["embedding"]
    expected = tree.replace(
        model().params, {"embed/embedding": table.at[jnp.asarray(IDS)].multiply(2)}
    )
    found = ROWS.merge(model().params, adapter)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_copy_of_a_tied_embedding_leaves_the_head(tmp_path):
    """A model that was merged says in its config that it is not tied."""
    merged = COPIES.merge(model().params, moved(COPIES.init(KEY, model().params)))
    np.testing.assert_array_equal(merged["head"]["kernel"], model().params["embed"]["embedding"].T)
    tj.models.save_model(tmp_path / "out", model(), merged)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([61], "token 61 is no row of embed/embedding, which has 61"),
        ({"norm/scale": [1]}, "'norm/scale' has no rows of tokens"),
    ],
    ids=["id", "name"],
)
def test_rows_that_there_are_not_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        beside(lora(2), None, ids).init(KEY, model().params)


@pytest.fixture
def saved(tmp_path):
    """An adapter's folder, to be spoiled."""
    tj.save_adapter(tmp_path, model(), COPIES, COPIES.init(KEY, model().params))
    return tmp_path


def spoil(path, change=lambda tensors: None, **fields):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


NORM = "base_model.model.model.norm.weight"
BASE = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "modules_to_save names model.norm, but .* no 'model.norm.weight'"),
        (lambda t: t.update({NORM: np.ones(3, np.float32)}), r"norm.weight.* is \(3,\).*\(32,\)"),
        (lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}), "norm.weight holds NaN"),
        (lambda t: t.update({BASE: np.ones((62, 32), np.float32)}), "tokens were added"),
    ],
    ids=["missing", "shape", "nan", "another base"],
)
def test_a_copy_that_does_not_fit_is_named(saved, change, message):
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(spoil(saved, change), model())


def test_the_bases_own_embedding_beside_an_adapter_is_passed_over(saved):
    table = np.asarray(model().params["embed"]["embedding"])
    _, adapter = tj.load_adapter(spoil(saved, lambda t: t.update({BASE: table})), model())
    assert set(adapter) == {"method", "saved", "tokens"}


def test_copies_that_would_have_to_stay_tied_are_refused(saved):
    with pytest.raises(ValueError, match="ensure_weight_tying=True"):
        tj.load_adapter(spoil(saved, ensure_weight_tying=True), model())


def test_dora_on_the_embedding_is_refused_by_name(tmp_path):
    tj.save_adapter(tmp_path, model(), ENDS, ENDS.init(KEY, model().params))
    with pytest.raises(ValueError, match="DoRA on the embedding"):
        tj.load_adapter(spoil(tmp_path, use_dora=True), model())


def test_a_method_with_its_own_optimizer_does_not_train_with_others_beside_it():
    method = beside(tj.peft.adalora(2), "^norm/")
    with pytest.raises(ValueError, match="needs an optimizer of its own"):
        method.transform(10, optax.sgd(1.0))
    assert beside(dora(2), "^norm/").transform is None

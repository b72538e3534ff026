"""BitFit: which biases train, where they are added, and what merges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import tree
from trainjax.peft.bitfit import Biased, bitfit, from_peft
from trainjax.types import PeftFiles

KEY = jax.random.key(0)
BIASED = {"attention_bias": True, "mlp_bias": True}
QKV = [f"layers/attention/{name}/bias" for name in ("key", "query", "value")]


def names(method, params) -> list[str]:
    return list(tree.flatten(jax.eval_shape(method.init, KEY, params)))


def qwen2():
    return contract.with_biases(helpers.tiny().params)


def test_a_model_with_biases_trains_those_and_begins_with_their_values():
    params = qwen2()
    adapter = tree.flatten(bitfit().init(KEY, params))
    assert list(adapter) == QKV
    for name, bias in adapter.items():
        np.testing.assert_array_equal(bias, tree.flatten(params)[name])


def test_a_model_without_biases_gets_one_at_every_targeted_matrix():
    assert names(bitfit("query|mlp"), helpers.tiny().params) == [
        "layers/attention/query/kernel/bias",
        *(f"layers/mlp/{name}/kernel/bias" for name in ("down", "gate", "up")),
    ]


def test_biases_are_added_beside_those_there_are_only_on_request():
    assert names(bitfit("query|output", add=None), qwen2()) == [QKV[1]]
    assert names(bitfit("query|output", add=True), qwen2()) == [
        "layers/attention/output/kernel/bias",
        QKV[1],
    ]


@pytest.mark.parametrize("target", ["query", "query/bias", "attention/query/kernel"])
def test_a_target_names_a_bias_or_the_matrix_beside_it(target):
    assert names(bitfit(target), helpers.tiny(**BIASED).params) == ["layers/attention/query/bias"]


def test_biases_without_a_matrix_count():
    """Those of a layer norm, in a model of one's own."""
    params = {"layers": {"norm": {"bias": jnp.zeros((2, 4)), "scale": jnp.ones((2, 4))}}}
    adapter = bitfit().init(KEY, params)
    assert list(tree.flatten(adapter)) == ["layers/norm/bias"]
    moved = jax.tree.map(lambda leaf: leaf + 1, adapter)
    assert bool((bitfit().attach(params, moved)["layers"]["norm"]["bias"] == 1).all())


def test_an_added_bias_is_added_in_the_dtype_of_the_activations():
    x, bias = jnp.ones((3, 4), jnp.bfloat16), jnp.linspace(0.0, 1.0, 5)
    found = x @ Biased(jnp.zeros((4, 5)), bias)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.broadcast_to(bias.astype(jnp.bfloat16), (3, 5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "qeury"}, "matches 'qeury'; the names are .*layers/attention/query/kernel"),
        ({"target": "query", "add": False}, "no bias that target='query' matches.* add=True gives"),
        ({"target": "head"}, "the output head is a matrix without a bias"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        bitfit(**settings).init(KEY, helpers.tiny().params)


def test_added_biases_are_not_merged_and_the_error_says_why():
    params, method = helpers.tiny().params, bitfit("query")
    message = (
        "added to layers/attention/query/kernel cannot be merged: the architecture has no bias"
    )
    with pytest.raises(ValueError, match=message):
        method.merge(params, method.init(KEY, params))


def test_an_adapter_of_other_names_is_refused():
    params, method = helpers.tiny().params, bitfit("query")
    for name in ("layers/mixer/bias", "layers/mixer/kernel/bias"):
        with pytest.raises(ValueError, match=f"the adapter has '{name}', which the model"):
            method.attach(params, tree.unflatten({name: jnp.zeros((2, 4))}))


def test_files_of_a_model_with_biases_do_not_fit_one_without():
    method, with_biases = bitfit(add=False), helpers.tiny(**BIASED).params
    files = method.export(method.init(KEY, with_biases), {})
    with pytest.raises(ValueError, match="the model has no bias"):
        from_peft(files, {}, helpers.tiny().params)
    with pytest.raises(ValueError, match="sets rank=3, which bitfit does not have"):
        from_peft(PeftFiles(files.fields | {"rank": 3}, files.tensors), {}, with_biases)


class TestContract(contract.Contract):
    methods = {"those there are": bitfit()}
    settings = BIASED


class TestContractOfAdded(contract.Contract):
    methods = {"added": bitfit()}
    merges = False

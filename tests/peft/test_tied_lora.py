"""Tied-LoRA: which arrays are tied, the formula, the files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract
from tests.peft.fake_quant import dequantised, quantised
from trainjax import tree
from trainjax.peft.tied_lora import tied_lora

KEY = jax.random.key(0)
UP = "layers/mlp/up/kernel"


def test_factors_are_of_all_layers_and_vectors_of_each():
    params = helpers.tiny().params
    adapter = tree.flatten(tied_lora(rank=2, target="up|head").init(KEY, params))
    assert {name: leaf.shape for name, leaf in adapter.items()} == {
        "head/kernel/a": (32, 2),
        "head/kernel/b": (2, 61),
        "head/kernel/u": (2,),
        "head/kernel/v": (61,),
        f"{UP}/a": (1, 32, 2),
        f"{UP}/b": (1, 2, 48),
        f"{UP}/u": (2, 2),
        f"{UP}/v": (2, 48),
    }


def test_the_update_is_a_u_b_v_of_the_layer():
    method = tied_lora(rank=2, alpha=6.0, target="up")
    params = helpers.tiny().params
    adapter = contract.moved(method.init(KEY, params))
    a, b, u, v = (np.asarray(tree.flatten(adapter)[f"{UP}/{part}"], np.float64) for part in "abuv")
    w = np.asarray(tree.flatten(params)[UP], np.float64)
    found = tree.flatten(method.merge(params, adapter))[UP]
    for layer in (0, 1):
        expected = w[layer] + 3.0 * a[0] @ np.diag(u[layer]) @ b[0] @ np.diag(v[layer])
        np.testing.assert_allclose(found[layer], expected, rtol=0, atol=1e-5)


def test_the_gradient_of_a_tied_factor_is_the_sum_over_the_layers():
    method = tied_lora(rank=2, target="up")
    params = tree.unflatten({UP: jnp.zeros((3, 8, 6))})
    adapter = contract.moved(method.init(KEY, params))
    x = jnp.ones((2, 8))

    def total(adapter, layers):
        stack = tree.flatten(method.attach(params, adapter))[UP]
        return sum(
            jnp.sum((x @ jax.tree.map(lambda leaf, n=n: leaf[n], stack)) ** 2) for n in layers
        )

    together, *alone = jax.jit(
        lambda adapter: [jax.grad(total)(adapter, layers) for layers in ([0, 1, 2], [0], [1], [2])]
    )(adapter)
    found = tree.flatten(together)[f"{UP}/b"]
    expected = sum(np.asarray(tree.flatten(one)[f"{UP}/b"]) for one in alone)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 for layers/attention/key/kernel, 32 x 16: a rank is from 1 to 16"),
        ({"rank": 17}, "rank=17 for layers/attention/key/kernel"),
        ({"dropout": 1.0}, r"dropout=1.0 is not a probability"),
        ({"target": "qeury"}, "matches 'qeury'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        tied_lora(**settings).init(KEY, helpers.tiny().params)


@pytest.mark.parametrize(
    ("fields", "part", "message"),
    [
        ({"ranks": 3}, None, "sets ranks=3, which tied_lora does not have"),
        ({}, lambda u: u[:1], r"up/kernel/u has the shape \(1, 2\), this model's has \(2, 2\)"),
        ({}, lambda u: u * np.float32(np.nan), "up/kernel/u' holds NaN"),
    ],
    ids=["field", "shape", "nan"],
)
def test_files_that_cannot_be_are_refused_by_name(tmp_path, fields, part, message):
    model, method = helpers.tiny(), tied_lora(rank=2, target="up")
    found = method.export(method.init(KEY, model.params), {})
    tensors = dict(found.tensors)
    if part is not None:
        tensors[f"{UP}/u"] = part(tensors[f"{UP}/u"])
    files = tj.types.PeftFiles(found.fields | fields, tensors)
    tj.io.peft.write(tmp_path, files, model.fingerprint)
    with pytest.raises(ValueError, match=message):
        tj.load_adapter(tmp_path, model)


def test_over_a_quantised_base_it_is_the_update_over_the_dequantised_one():
    model, method = helpers.tiny(), tied_lora(rank=2)
    codes = quantised(model.params)
    adapter = contract.moved(method.init(KEY, codes))
    expected = model.with_params(method.attach(dequantised(codes), adapter))
    for params in (method.attach(codes, adapter), method.merge(codes, adapter)):
        found = model.with_params(params).logits(contract.TOKENS)
        np.testing.assert_allclose(found, expected.logits(contract.TOKENS), rtol=0, atol=1e-4)


class TestContract(contract.Contract):
    methods = {"plain": tied_lora(rank=2, alpha=4.0)}

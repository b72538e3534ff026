"""Progressive adapters: earlier ones stay as they are, and lateral weights say how much of them is used."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import tree
from trainjax.peft import lora
from trainjax.peft.columns import columns
from trainjax.peft.molora import molora

KEY = jax.random.key(0)
TOKENS = contract.TOKENS


@functools.cache
def earlier():
    """Two adapters of tasks before, of other ranks and targets."""
    params = helpers.tiny().params
    methods = lora(rank=2, alpha=4.0, target="query|up|down"), lora(rank=3, target="up")
    return [(m, contract.moved(m.init(KEY, params), seed)) for seed, m in enumerate(methods, 5)]


def logits(model, method, adapter):
    return model.with_params(method.attach(model.params, adapter)).logits(TOKENS)


def test_at_one_it_begins_as_the_sum_of_the_earlier_and_at_zero_as_the_base():
    model, before = helpers.tiny(), earlier()
    base = jax.device_get(tree.flatten(model.params))
    total = dict(base)
    for method, adapter in before:
        for name, leaf in tree.flatten(method.merge(model.params, adapter)).items():
            total[name] = total[name] + (np.asarray(leaf) - base[name])
    summed = jax.tree.map(jnp.array, tree.unflatten(total))
    expected = model.with_params(summed).logits(TOKENS)
    method = columns(lora(rank=2), before, start=1.0)
    found = logits(model, method, method.init(KEY, model.params))
    helpers.assert_close({"logits": found}, {"logits": expected}, 1e-5)
    method = columns(lora(rank=2), before)
    found = logits(model, method, method.init(KEY, model.params))
    helpers.assert_close({"logits": found}, {"logits": model.logits(TOKENS)}, 1e-5)


@pytest.mark.parametrize("per_output", [False, True])
def test_matrix_is_the_base_the_new_update_and_each_earlier_one_by_its_lateral_weight(per_output):
    params, before = helpers.tiny().params, earlier()
    new = lora(rank=2, target="up")
    method = columns(new, before, per_output=per_output)
    adapter = contract.moved(method.init(KEY, params), std=0.5)
    name = "layers/mlp/up/kernel"
    base = np.asarray(tree.flatten(params)[name], np.float64)
    lateral = np.asarray(tree.flatten(adapter["lateral"])[f"{name}/lateral"], np.float64)
    assert lateral.shape == (2, 2, 48 if per_output else 1)
    expected = np.asarray(tree.flatten(new.merge(params, adapter["new"]))[name], np.float64)
    for column, (own, theirs) in enumerate(before):
        update = np.asarray(tree.flatten(own.merge(params, theirs))[name], np.float64) - base
        expected += lateral[:, column, None, :] * update
    found = tree.flatten(method.merge(params, adapter))[name]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_lateral_weights_of_zero_have_a_gradient_and_earlier_columns_none():
    model = helpers.tiny()
    method = columns(lora(rank=2, target="up"), earlier())
    adapter = method.init(KEY, model.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(adapter["lateral"]))
    loss = contract.Contract.loss(model, method)
    _, grads = helpers.loss_and_gradients(loss, adapter, contract.batch())
    assert not any(name.startswith("earlier") for name in grads)
    up = grads["lateral/layers/mlp/up/kernel/lateral"]
    assert up.shape == (2, 2, 1)
    assert np.abs(up).min() > 1e-5
    # A column that leaves a matrix alone has no part there.
    down = grads["lateral/layers/mlp/down/kernel/lateral"]
    assert down[:, 0].all()
    assert not down[:, 1].any()


def test_a_trained_column_is_an_earlier_one_of_the_next_task():
    model, before, new = helpers.tiny(), earlier(), lora(rank=2)
    first = columns(new, before)
    trained = contract.moved(first.init(KEY, model.params))
    then = columns(new, [*before, (new, trained["new"])], start=1.0)
    adapter = then.init(KEY, model.params)
    assert sorted(adapter["earlier"]) == ["0", "1", "2"]
    contract.equal(adapter["earlier"]["2"].value, trained["new"])
    assert bool(jnp.all(adapter["earlier"]["2"].value["layers"]["mlp"]["up"]["kernel"]["b"] != 0))


def test_what_cannot_be_a_column_is_named():
    with pytest.raises(ValueError, match="no earlier columns"):
        columns(lora(), [])
    with pytest.raises(ValueError, match="has a penalty or an optimizer's link of its own"):
        columns(molora(), earlier())


class TestContract(contract.Contract):
    methods = {
        "of outputs": columns(lora(rank=2, target="query|up|down"), earlier(), per_output=True)
    }

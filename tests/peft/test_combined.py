"""Several adapters at once: a weighted sum of what each adds, trained together or apart."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.peft import contract
from trainjax import tree
from trainjax.peft import Lora, lora
from trainjax.peft._sum import Sum
from trainjax.peft.combined import combined, together
from trainjax.peft.molora import molora
from trainjax.types import Frozen

KEY = jax.random.key(0)
TWO = {"code": lora(rank=2, alpha=4.0), "maths": lora(rank=3, target="query|up", rslora=True)}


def trained(methods=None):
    """Members by name with their adapters, as they were trained apart."""
    return {
        name: (method, _trained(method, seed))
        for seed, (name, method) in enumerate((methods or TWO).items())
    }


@functools.cache
def _trained(method, seed):
    return contract.moved(method.init(KEY, helpers.tiny().params), seed)


def test_sum_is_task_arithmetic_on_the_matrices_in_one_product():
    """In float64; matrices that one member leaves alone have the other's update only."""
    params, members = helpers.tiny().params, trained()
    method, adapter = together(members, {"code": 0.7, "maths": -0.4})
    attached = tree.flatten(method.attach(params, adapter))
    base = tree.flatten(params)
    merged = {
        name: (own.merge(params, theirs), weight)
        for (name, (own, theirs)), weight in zip(members.items(), (0.7, -0.4), strict=True)
    }
    for name, w in base.items():
        expected = np.asarray(w, np.float64)
        for theirs, weight in merged.values():
            expected = expected + weight * (np.asarray(tree.flatten(theirs)[name], np.float64) - w)
        found = attached[name]
        if isinstance(found, Lora):
            assert found.w is w
            assert found.a.shape[-1] == (5 if "query" in name or "up" in name else 2)
            found = found.dense()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_members_of_other_methods_are_summed_and_their_order_does_not_matter():
    params, x = helpers.tiny().params, np.float32(np.random.default_rng(0).standard_normal((5, 32)))
    methods = {"code": lora(rank=2, target="up"), "mix": molora(rank=2, target="up", experts=2)}
    members = trained(methods)
    weights = {"code": 0.5, "mix": 2.0}
    name = "layers/mlp/up/kernel"
    multiply = jax.jit(jax.vmap(lambda x, w: x @ w, (None, 0)))
    times = lambda params: np.asarray(multiply(x, tree.flatten(params)[name]))  # noqa: E731
    base = times(params)
    expected = base + sum(
        weights[who] * (times(method.attach(params, own)) - base)
        for who, (method, own) in members.items()
    )
    for order in (("code", "mix"), ("mix", "code")):
        method, adapter = together({who: members[who] for who in order}, weights)
        attached = method.attach(params, adapter)
        assert isinstance(tree.flatten(attached)[name], Sum)
        np.testing.assert_allclose(times(attached), expected, rtol=0, atol=2e-5)


def test_dropout_of_lora_members_is_each_ones_own_and_frozen_members_have_none():
    params = helpers.tiny().params
    methods = {"a": lora(rank=2, target="up", dropout=0.5), "b": lora(rank=2, target="up")}
    members = trained(methods)
    method, adapter = together(members, frozen=["b"])
    name = "layers/mlp/up/kernel"
    x = jnp.ones((3, 32))

    def times(key, adapter):
        return jax.vmap(lambda w: x @ w)(tree.flatten(method.attach(params, adapter, key))[name])

    many = np.asarray(jax.jit(jax.vmap(times, (0, None)))(jax.random.split(KEY, 300), adapter))
    still = np.asarray(times(None, adapter))
    spread = many.std(axis=0) / 300**0.5
    assert float(np.max(np.abs(many.mean(axis=0) - still) / spread)) < 4.5
    frozen = {**adapter, "members": {who: Frozen(own) for who, (_, own) in members.items()}}
    np.testing.assert_allclose(times(KEY, frozen), still, rtol=0, atol=1e-5)


def test_weights_that_learn_train_and_others_do_not():
    model, members = helpers.tiny(), trained()
    for learned in (True, False):
        method, adapter = together(members, learned=learned)
        trains = tree.flatten(tree.trainable(adapter))
        assert set(trains) == ({"weights/code", "weights/maths"} if learned else set())
    method, adapter = together(members, learned=True)
    loss = contract.Contract.loss(model, method)
    _, grads = helpers.loss_and_gradients(loss, adapter, contract.batch())
    assert all(abs(float(grad)) > 1e-4 for grad in grads.values())


def test_penalties_of_members_are_theirs_by_name():
    """Two routers, of which each member's penalty sees its own."""
    model = helpers.tiny()
    methods = {
        "two": molora(rank=2, target="up", experts=2, balance=1.0),
        "three": molora(rank=2, target="up", experts=3, top_k=1, balance=1.0),
    }
    method = combined(methods)
    adapter = contract.moved(method.init(KEY, model.params))
    loss = contract.Contract.loss(model, method)
    _, metrics = jax.jit(lambda adapter, batch: loss(adapter, batch))(adapter, contract.batch())
    assert {"two/balance", "two/load/1", "three/balance", "three/load/2"} <= metrics.keys()
    assert "two/load/2" not in metrics
    assert 1 <= float(metrics["two/balance"]) <= 2
    np.testing.assert_allclose(sum(metrics[f"three/load/{e}"] for e in range(3)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        ({}, {}, "no adapters to combine"),
        ({"a/b": lora()}, {}, "'a/b' is no name for a member"),
        ({"code": lora()}, {"weights": {"cod": 1.0}}, "'cod' is no member; did you mean 'code'"),
        ({"code": lora()}, {"frozen": ["x"]}, "'x' is no member"),
        (
            {"code": lora()._replace(transform=lambda steps: None)},
            {},
            "member 'code' needs an optimizer of its own",
        ),
    ],
    ids=["none", "name", "weights", "frozen", "optimizer"],
)
def test_a_bad_setting_is_named_with_what_would_be_right(members, settings, message):
    with pytest.raises(ValueError, match=message):
        combined(members, **settings)


def test_a_member_that_does_not_merge_is_named():
    params = helpers.tiny().params
    method = combined({"mix": molora(rank=2, target="up", experts=2)})
    with pytest.raises(ValueError, match="molora does not merge"):
        method.merge(params, method.init(KEY, params))


class TestContract(contract.Contract):
    methods = {
        "a frozen one and learned weights": combined(
            TWO, {"maths": 0.5}, frozen=["maths"], learned=True
        )
    }

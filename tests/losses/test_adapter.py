"""The term of a method itself: counted once, and on what the forward pass of the task reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from trainjax import losses, sharing, tree
from trainjax.peft import lora
from trainjax.types import Weight, pytree


@pytree
class Telling(Weight):
    """A matrix that reports the first number of every row that it sees."""

    w: jax.Array

    def __rmatmul__(self, x):
        return x @ self.w

    @property
    def shape(self):
        return self.w.shape

    def dense(self):
        return self.w

    def reports(self, x):
        return {"first": x[:, 0]}


def penalty(adapter, reports, rows):
    """The sum of the factors, and of what was reported the weighted mean."""
    mean = jnp.sum(reports["layers/mlp/up/first"] * rows)
    return a_sum(adapter) + mean, {"mean": mean}


METHOD = lora(rank=2, target="query")


def attach(params, adapter, key=None):
    """LoRA on the queries, and a matrix that reports."""
    up = Telling(params["layers"]["mlp"]["up"]["kernel"])
    return METHOD.attach(tree.replace(params, {"layers/mlp/up/kernel": up}), adapter, key)


TELLING = METHOD._replace(penalty=penalty, attach=attach)


def batch():
    examples = [np.arange(5, 12, dtype=np.int32), np.arange(9, 13, dtype=np.int32)]
    return jax.tree.map(jnp.asarray, helpers.packed(examples, [[0], [1]], 9))


@jax.jit
def reports(policy, adapter, batch):
    return policy.reports(adapter, batch)


def test_reports_come_from_every_layer_and_row_in_their_order():
    model = helpers.tiny()
    policy = tj.policy(model, TELLING)
    adapter = METHOD.init(jax.random.key(0), model.params)
    ((name, found),) = reports(policy, adapter, batch()).items()
    assert found.shape == (2, 2 * 9)
    assert name == "layers/mlp/up/first"
    assert not reports(tj.policy(model, METHOD), adapter, batch())


def test_the_mean_is_of_real_tokens_only():
    """Eleven of eighteen are no padding."""
    model = helpers.tiny()
    policy = tj.policy(model, TELLING)
    adapter = METHOD.init(jax.random.key(0), model.params)
    (found,) = reports(policy, adapter, batch()).values()
    real = batch()["segments"].reshape(-1) > 0
    expected = np.asarray(found)[:, real].mean(axis=1).sum()
    penalised = jax.jit(lambda loss, *args: loss(*args))
    _, metrics = penalised(losses.adapter_penalty(policy), adapter, batch())
    np.testing.assert_allclose(metrics["mean"], expected, rtol=1e-5)


def test_a_penalty_of_the_params_counts_once_however_the_batch_is_cut():
    model = helpers.tiny()
    policy = tj.policy(model, METHOD._replace(penalty=lambda a, reports, rows: (a_sum(a), {})))
    adapter = METHOD.init(jax.random.key(0), model.params)
    loss = losses.adapter_penalty(policy, strength=3.0)
    whole, parts = (
        helpers.loss_and_gradients(loss, adapter, helpers.random_batch(rows=4), n)[0]
        for n in (1, 2)
    )
    np.testing.assert_allclose([whole, parts], 3 * float(a_sum(adapter)), rtol=1e-5)


def a_sum(adapter):
    return sum(leaf.sum() for leaf in jax.tree.leaves(adapter))


def test_it_shares_the_forward_pass_of_the_task():
    model = helpers.tiny()
    policy = tj.policy(model, TELLING)
    adapter = METHOD.init(jax.random.key(0), model.params)
    with sharing.scope():
        first = policy.hidden(adapter, read := batch())
        policy.reports(adapter, read)
        assert policy.hidden(adapter, read) is first


@pytest.mark.parametrize("method", [METHOD, None])
def test_a_method_without_a_penalty_is_refused(method):
    with pytest.raises(ValueError, match="has no penalty; adalora and molora have one"):
        losses.adapter_penalty(tj.policy(helpers.tiny(), method))

"""MoLoRA: what a router and its experts compute, and the penalty that keeps them busy alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import trainjax as tj
from tests import helpers
from tests.peft import contract
from trainjax import losses, parallel, tree
from trainjax.peft.molora import molora
from trainjax.train import init, make_step

KEY = jax.random.key(0)
NAME = "layers/mlp/up/kernel"
ADAM = optax.adam(1e-2)
STEP = make_step(ADAM)


def drawn(experts: int = 3, rank: int = 2, layers: int = 2):
    """A model of one stack of 8 x 6 matrices, an adapter with nothing at zero, and inputs."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((layers, 8, 6)),
        "a": rng.standard_normal((layers, 8, experts * rank)),
        "b": rng.standard_normal((layers, experts * rank, 6)),
        "router": rng.standard_normal((layers, 8, experts)),
    }
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    params = tree.unflatten({NAME: arrays.pop("w")})
    adapter = tree.unflatten({f"{NAME}/{part}": value for part, value in arrays.items()})
    return params, adapter, jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)


@jax.jit
def times(x, stack):
    """`x` times each matrix of a stack."""
    return jax.vmap(lambda w: x @ w)(stack)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_output_is_the_base_and_the_experts_by_their_gates(top_k):
    """One expert after another, in float64."""
    method = molora(rank=2, alpha=6.0, target="up", experts=3, top_k=top_k)
    params, adapter, x = drawn()
    found = times(x, tree.flatten(method.attach(params, adapter))[NAME])
    w = np.asarray(tree.flatten(params)[NAME], np.float64)
    parts = {name[-1]: np.asarray(leaf, np.float64) for name, leaf in tree.flatten(adapter).items()}
    rows = np.asarray(x, np.float64)
    for layer in range(2):
        scores = rows @ parts["r"][layer]
        gates = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        if top_k is not None:
            gates = np.where(gates >= np.sort(gates)[:, [-top_k]], gates, 0.0)
        expected = rows @ w[layer]
        for expert in range(3):
            own = slice(2 * expert, 2 * expert + 2)
            update = rows @ parts["a"][layer, :, own] @ parts["b"][layer, own] * (6 / 2)
            expected += gates[:, [expert]] * update
        np.testing.assert_allclose(found[layer], expected, rtol=0, atol=2e-5)


def test_equal_probabilities_choose_exactly_top_k():
    method = molora(rank=2, target="up", experts=3, top_k=2, alpha=2.0)
    params, adapter, x = drawn()
    adapter = tree.replace(adapter, {f"{NAME}/router": jnp.zeros((2, 8, 3))})
    found = times(x, tree.flatten(method.attach(params, adapter))[NAME])
    w, a, b = (
        np.asarray(tree.flatten(t)[n])
        for t, n in ((params, NAME), (adapter, f"{NAME}/a"), (adapter, f"{NAME}/b"))
    )
    expected = np.asarray(x) @ (w + a[..., :4] @ b[:, :4] / 3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def penalty_of(method, probabilities, rows):
    reports = {"up/molora_probabilities": jnp.asarray(probabilities)}
    return jax.jit(lambda *given: method.penalty({}, *given))(reports, rows)


def test_penalty_is_experts_times_load_times_probability_of_tokens_that_are_no_padding():
    """Two routers, three tokens, the last one padding; each sum by hand."""
    probabilities = np.float32(
        [
            [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.0, 0.0, 1.0]],
            [[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0]],
        ]
    )
    rows = jnp.asarray([0.5, 0.5, 0.0])
    value, metrics = penalty_of(molora(experts=3, top_k=1, balance=0.1), probabilities, rows)
    # P: [.4, .5, .1] and [.65, .2, .15]; f: [.5, .5, 0] and [1, 0, 0].
    balance = 3 * ((0.5 * 0.4 + 0.5 * 0.5) + 0.65) / 2
    np.testing.assert_allclose(metrics["balance"], balance, rtol=1e-6)
    np.testing.assert_allclose(value, 0.1 * balance, rtol=1e-6)
    np.testing.assert_allclose([metrics[f"load/{e}"] for e in range(3)], [0.75, 0.25, 0.0])
    np.testing.assert_allclose(metrics["max_load"], (0.5 + 1) / 2)
    _, soft = penalty_of(molora(experts=3, balance=0.1), probabilities, rows)
    squares = np.square([[0.4, 0.5, 0.1], [0.65, 0.2, 0.15]]).sum()
    np.testing.assert_allclose(soft["balance"], 3 * squares / 2, rtol=1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_penalty_is_one_in_balance_and_the_number_of_experts_on_collapse(top_k):
    rows = jnp.full(6, 1 / 6)
    method = molora(experts=3, top_k=top_k, balance=1.0)
    even = np.float32([np.roll([0.5, 0.3, 0.2], i % 3) for i in range(6)])
    np.testing.assert_allclose(penalty_of(method, even, rows)[0], 1.0, rtol=1e-6)
    if top_k != 2:  # the second choice goes elsewhere
        one = np.tile(np.float32([1.0, 0.0, 0.0]), (6, 1))
        np.testing.assert_allclose(penalty_of(method, one, rows)[0], 3.0, rtol=1e-6)


def test_padding_changes_neither_penalty_nor_metrics():
    model = helpers.tiny()
    method = molora(rank=2, target="up|query", experts=3, top_k=1)
    adapter = contract.moved(method.init(KEY, model.params), std=0.5)
    loss = losses.adapter_penalty(tj.policy(model, method))
    value = jax.jit(lambda adapter, batch: loss(adapter, batch))
    short, metrics = value(adapter, contract.batch())
    padded = {name: np.pad(value, ((0, 0), (0, 9))) for name, value in contract.batch().items()}
    long, same = value(adapter, padded)
    np.testing.assert_allclose(long, short, rtol=1e-5)
    helpers.assert_close(same, metrics, 1e-5)
    assert 0.9 < sum(float(metrics[f"load/{e}"]) for e in range(3)) < 1.1


def test_the_penalty_shares_the_tasks_forward_pass():
    """As many products in the program of the sum as in that of the task alone."""
    model, method = helpers.tiny(), molora(rank=2, target="query|up", experts=3, top_k=1)
    adapter = method.init(KEY, model.params)
    policy = tj.policy(model, method)
    task = losses.sft(policy)
    with_penalty = task + losses.adapter_penalty(policy)
    scans = [
        str(jax.make_jaxpr(loss)(adapter, contract.batch())).count("scan[")
        for loss in (task, with_penalty)
    ]
    assert scans[0] == scans[1] > 0


def busiest_after_training(balance: float) -> tuple[float, float]:
    """The share of a router's busiest of four experts, before training and after 60 steps."""
    model = helpers.tiny()
    method = molora(rank=2, target="up", experts=4, top_k=1, balance=1.0)
    policy = tj.policy(model, method)
    loss = losses.sft(policy) + balance * losses.adapter_penalty(policy)
    state, trace = init(method.init(KEY, model.params), ADAM), []
    for _ in range(60):
        state, metrics = STEP(state, loss, contract.batch())
        trace.append(float(metrics["max_load"]))
    return trace[0], float(np.mean(trace[-10:]))


def test_experts_come_into_balance_with_the_penalty_and_collapse_without():
    """In balance each of the four has 0.25; in one batch of 47 tokens nearly so."""
    start, collapsed = busiest_after_training(1e-9)
    _, balanced = busiest_after_training(0.3)
    assert collapsed > 1.3 * start
    assert collapsed > 0.7
    assert balanced < 0.4 < start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 1}, "experts=1: a router needs at least 2"),
        ({"top_k": 5}, "top_k=5 is outside 1 to experts=4; None"),
        ({"top_k": 0}, "top_k=0 is outside"),
        ({"balance": -0.1}, "balance=-0.1 would reward"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"rank": 33}, "rank=33 is above the sides of"),
        ({"target": "qeury"}, "matches 'qeury'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    params = helpers.tiny().params
    with pytest.raises(ValueError, match=message):
        molora(**settings).init(KEY, params)


def test_dropout_is_of_the_experts_input_and_only_with_a_key():
    method = molora(rank=2, target="up", experts=3, dropout=0.5)
    params, adapter, x = drawn()

    def times(key):
        return jax.vmap(lambda w: x @ w)(tree.flatten(method.attach(params, adapter, key))[NAME])

    many = np.asarray(jax.jit(jax.vmap(times))(jax.random.split(KEY, 400)))
    still = np.asarray(jax.jit(lambda: times(None))())
    assert np.any(many[0] != still)
    spread = many.std(axis=0) / 400**0.5
    assert float(np.max(np.abs(many.mean(axis=0) - still) / spread)) < 4.5


class TestContract(contract.Contract):
    merges = False
    methods = {
        "soft": molora(rank=2, target="query|up|down", experts=3, dropout=0.1),
        "top 2": molora(rank=2, target="query|up", experts=3, top_k=2),
        "all matrices": molora(rank=2, experts=3, dropout=0.1),
    }


def test_experts_are_split_over_the_axis_for_them_and_train_the_same():
    mesh = parallel.mesh(fsdp=2, expert=2)
    method = molora(rank=2, experts=4, target="mlp/up")
    one = helpers.tiny()
    spread = contract.changed(one, mesh=mesh).with_params(parallel.place(one.params, mesh))
    models = [one, spread]
    adapters = [helpers.randomised(method.init(jax.random.key(0), m.params), 0.1) for m in models]
    found = {name: leaf.sharding.spec for name, leaf in tree.flatten(adapters[1]).items()}
    assert found == {
        "layers/mlp/up/kernel/a": P(None, "fsdp", "expert"),
        "layers/mlp/up/kernel/b": P(None, "expert", "tensor"),
        "layers/mlp/up/kernel/router": P(None, "fsdp", "expert"),
    }
    each = [
        helpers.loss_and_gradients(
            losses.sft(tj.policy(model, method)), adapter, helpers.random_batch()
        )
        for model, adapter in zip(models, adapters, strict=True)
    ]
    np.testing.assert_allclose(each[1][0], each[0][0], rtol=1e-5)
    helpers.assert_close(each[1][1], each[0][1], 1e-5)

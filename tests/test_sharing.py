"""What terms of a loss share: results that were asked for before, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from trainjax import losses, policies, sharing
from trainjax.peft import lora
from trainjax.train.step import lowered

X, Y = jnp.arange(3.0), jnp.arange(3.0)


@pytest.fixture
def calls():
    """A function that lists how often it was called, by its second argument."""
    seen: list[str] = []

    def f(x, name):
        seen.append(name["name"])
        return 2 * x

    f.seen = seen
    return f


def test_the_very_same_arrays_are_asked_for_once(calls):
    with sharing.scope():
        first = sharing.once(calls, X, {"name": "a"})
        assert sharing.once(calls, X, {"name": "a"}) is first
        sharing.once(calls, Y, {"name": "a"})  # equal, and yet another array
    assert calls.seen == ["a", "a"]


def test_another_structure_or_function_is_another_call(calls):
    with sharing.scope():
        sharing.once(calls, X, {"name": "a"})
        sharing.once(calls, X, {"name": "a", "more": None})
        assert sharing.once(lambda x, name: x, X, {"name": "a"}) is X
    assert calls.seen == ["a", "a"]


def test_outside_of_a_scope_and_after_it_nothing_is_remembered(calls):
    for _ in range(2):
        sharing.once(calls, X, {"name": "a"})
    for _ in range(2):
        with sharing.scope():
            sharing.once(calls, X, {"name": "a"})
    assert calls.seen == ["a"] * 4


def test_a_scope_in_a_scope_is_part_of_it(calls):
    with sharing.scope():
        for _ in range(2):
            with sharing.scope():
                sharing.once(calls, X, {"name": "a"})
    assert calls.seen == ["a"]


def test_what_a_loop_made_stays_in_the_loop(calls):
    """The body closes over `x`; its result belongs to the body's own program."""

    def body(total, _):
        return total + sharing.once(calls, x, {"name": "in"}).sum(), None

    @jax.jit
    def program(x_):
        nonlocal x
        x = x_
        with sharing.scope():
            total = jax.lax.scan(body, jnp.float32(0), length=2)[0]
            return total + sharing.once(calls, x, {"name": "in"}).sum()

    x = X
    assert float(program(X)) == 3 * 2 * 3.0
    assert len(calls.seen) >= 2


# --- losses -------------------------------------------------------------------------------------


def pair_batch() -> dict[str, np.ndarray]:
    """Rows with two completions each; SFT's weights lie on the first."""
    batch = helpers.random_batch()
    places = np.arange(12)
    first, second = (places >= 3) & (places < 7), places >= 8
    return batch | {
        "weights": np.tile(first / (8 * first.sum()), (8, 1)).astype(np.float32),
        "completions": np.tile(first + 2 * second, (8, 1)).astype(np.int32),
        "groups": np.full((8, 1), 1 / 8, np.float32),
    }


@pytest.fixture
def forwards(monkeypatch):
    """Counts the forward passes that are traced."""
    count = []
    plain = policies._forward

    def counted(*args):
        count.append(args)
        return plain(*args)

    monkeypatch.setattr(policies, "_forward", counted)
    return count


METHOD = lora(rank=2, target="kernel", alpha=4.0)


def terms():
    model = helpers.tiny()
    ours, reference = tj.policy(model, METHOD), tj.reference(model)
    dpo = losses.dpo(ours, reference)
    return dpo, 0.1 * losses.sft(ours), 0.01 * losses.lwf(ours, reference)


def test_terms_of_one_policy_and_one_reference_take_one_forward_pass_of_each(forwards):
    """Through the step, whose jit must see that they hold the same weights."""
    dpo, sft, lwf = terms()
    adapter = helpers.trained(METHOD, helpers.tiny().params)
    together = helpers.loss_and_gradients(dpo + sft + lwf, adapter, pair_batch())
    assert len(forwards) == 2
    alone = [helpers.loss_and_gradients(term, adapter, pair_batch()) for term in (dpo, sft, lwf)]
    np.testing.assert_allclose(together[0], sum(loss for loss, _ in alone), rtol=1e-6)
    summed = {name: sum(g[name] for _, g in alone) for name in together[1]}
    helpers.assert_close(together[1], summed, 1e-6)


def test_terms_share_under_dropout_as_well(forwards):
    model = helpers.tiny()
    method = lora(rank=2, target="kernel", alpha=4.0, dropout=0.5)
    ours = tj.policy(model, method)
    loss = losses.sft(ours) + losses.dft(ours).named("dft")
    adapter = helpers.trained(method, model.params)
    jax.eval_shape(loss, adapter, pair_batch(), jax.random.key(0))
    assert len(forwards) == 1


def test_terms_weighed_by_their_uncertainty_share_as_well(forwards):
    dpo, sft, _ = terms()
    tasks = {"dpo": dpo, "sft": sft}
    params = losses.with_log_variances(helpers.trained(METHOD, helpers.tiny().params), tasks)
    state = tj.train.init(params, helpers.keep_gradients)
    lowered(helpers.gradient_step(), state, losses.uncertainty(tasks), pair_batch())
    assert len(forwards) == 2


def test_another_adapter_or_batch_is_another_forward_pass(forwards):
    model = helpers.tiny()
    ours = tj.policy(model, METHOD)
    both = losses.on("a", losses.sft(ours)).named("a") + losses.on("b", losses.sft(ours)).named("b")
    adapter = helpers.trained(METHOD, model.params)
    jax.eval_shape(both, adapter, {"a": pair_batch(), "b": pair_batch()})
    assert len(forwards) == 2

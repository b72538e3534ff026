"""Orders of an epoch: what is visited, when, and what a wrong one says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import toy
from trainjax import data, policies
from trainjax.data import curriculum


@pytest.fixture(scope="module")
def examples():
    return data.encode(toy.rows(40), toy.tokenizer(), 128)


def visited(examples, **settings) -> list[int]:
    number = settings.pop("epoch", 0)
    plan = data.Plan(4, 128, data.unpacked, **settings)
    return [i for batch in plan.epoch(examples, number) for row in batch.rows for i in row]


def test_easy_ones_come_first(examples):
    order = visited(examples, seed=None, order=curriculum.easy_first(examples.lengths))
    assert sorted(order) == list(range(len(examples)))
    assert (np.diff(examples.lengths[order]) >= 0).all()
    assert np.ptp(examples.lengths) > 0


def test_equal_ones_stay_in_their_order(examples):
    order = visited(examples, seed=None, order=curriculum.easy_first(np.zeros(len(examples))))
    assert order == list(range(len(examples)))


def test_each_epoch_draws_another_part_of_the_given_size(examples):
    order = curriculum.fresh_subset(0.3)
    parts = [visited(examples, seed=3, order=order, epoch=number) for number in range(4)]
    assert {len(part) for part in parts} == {round(0.3 * len(examples))}
    assert all(len(set(part)) == len(part) for part in parts)
    assert len({frozenset(part) for part in parts}) == len(parts)
    assert visited(examples, seed=3, order=order, epoch=2) == parts[2]


def test_an_evaluation_sees_every_example_whatever_the_order_of_training(examples):
    plan = data.Plan(4, 128, data.unpacked, order=curriculum.fresh_subset(0.3))
    batches = list(data.one_epoch(examples, plan))
    rows = {int(row) for batch in batches for row in np.unique(batch["rows"])} - {-1}
    assert rows == set(range(len(examples)))
    assert sum(float(batch["weights"].sum()) for batch in batches) == pytest.approx(1.0, abs=1e-5)


def test_every_example_is_drawn_in_time(examples):
    order = curriculum.fresh_subset(0.3)
    seen = {i for n in range(40) for i in visited(examples, seed=0, order=order, epoch=n)}
    assert len(seen) == len(examples)


def test_a_block_is_sorted_anew_and_the_rest_stays():
    order = np.array([4, 2, 0, 1, 3])
    found = curriculum.resorted(order, 1, 4, np.array([0.5, 0.9, 0.1]))
    assert found.tolist() == [4, 1, 2, 0, 3]
    assert order.tolist() == [4, 2, 0, 1, 3]


def test_the_reference_s_loss_is_the_mean_over_targets(examples):
    rng = np.random.default_rng(0)
    logprobs = -rng.gamma(1.0, 1.0, len(examples.tokens)).astype(np.float32)
    found = curriculum.reference_loss(dataclasses.replace(examples, reference=logprobs))
    for i in range(len(examples)):
        here = examples.slice_of(i)
        np.testing.assert_allclose(
            found[i], -logprobs[here][examples.trained[here]].mean(), rtol=1e-6
        )


def test_a_models_own_loss_orders_plain_examples_and_goes_into_their_batches(examples):
    model = tj.models.random_model(toy.CONFIG, jax.random.key(0))
    logprobs = policies.reference_logprobs(tj.reference(model))
    known = data.with_reference(examples, logprobs)
    sft = tj.losses.sft(tj.policy(model))
    loss = jax.jit(lambda params, batch: sft(params, batch)[0])
    for batch, row in zip(one_a_batch(known), curriculum.reference_loss(known), strict=True):
        np.testing.assert_allclose(loss(model.params, batch), row, rtol=1e-5)
        stored = jnp.sum(batch["weights"] * batch["reference_logprobs"])
        np.testing.assert_allclose(-stored, row, rtol=1e-5)


def one_a_batch(examples):
    return [
        {name: jnp.asarray(value) for name, value in data.fill(examples, plan, batch).items()}
        for plan in [data.Plan(1, 64, data.unpacked, seed=None, buckets=1)]
        for batch in plan.epoch(examples, 0)
    ]


WRONG = {
    "difficulties of 3 examples do not order 40": lambda e: visited(
        e, seed=None, order=curriculum.easy_first(np.arange(3))
    ),
    "difficulty of example 1 is not a number": lambda e: curriculum.easy_first(
        np.array([0.0, np.nan])
    ),
    "a fresh subset is drawn: give the plan a seed": lambda e: visited(
        e, seed=None, order=curriculum.fresh_subset(0.5)
    ),
    "fraction=1.5 of the examples": lambda e: curriculum.fresh_subset(1.5),
    "carry no reference; give them one by `with_reference`": curriculum.reference_loss,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_order_is_refused_in_a_sentence(examples, message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](examples)

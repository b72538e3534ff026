"""Losses on lists: against loops over pairs and choices, and what a policy learns from them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import bigram, toy
from trainjax.losses import preference, ranking
from trainjax.losses.pairs import Pairs
from trainjax.types import pytree

MASK = np.array([[True, True, True, True], [True, False, True, True], [True, True, False, False]])


def random_lists(seed: int = 0, dtype: type = np.float32) -> ranking.Lists:
    """Three lists of up to four, with some equal scores; what is not there is not a number."""
    rng = np.random.default_rng(seed)
    logprobs, reference = -rng.gamma(4.0, 2.0, (2, 3, 4))
    lengths = rng.integers(1, 9, (3, 4)).astype(dtype)
    scores = rng.integers(0, 3, (3, 4)).astype(dtype)
    arrays = (logprobs.astype(dtype), reference.astype(dtype), np.where(MASK, lengths, 0), scores)
    return ranking.Lists(*map(jnp.asarray, arrays), jnp.asarray(MASK))


def by_hand(lists: ranking.Lists, group: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A group's members, best first and else in order; mean log-probabilities; log-ratios."""
    members = np.flatnonzero(MASK[group])
    logprobs, reference, lengths, scores = (np.asarray(x[group], np.float64) for x in lists[:4])
    order = sorted(members, key=lambda i: -scores[i])
    return order, logprobs / np.maximum(lengths, 1), logprobs - reference


rrhf, plackett_luce = jax.jit(ranking.rrhf), jax.jit(ranking.plackett_luce)


@functools.cache
def slope(loss):
    """`(logprobs, lists) -> slope` of the sum."""
    return jax.jit(jax.grad(lambda x, lists: loss(lists._replace(logprobs=x)).sum()))


@pytest.mark.parametrize("seed", range(10))
def test_rrhf_is_its_loops(seed):
    lists, expected = random_lists(seed), []
    for group in range(3):
        order, means, _ = by_hand(lists, group)
        scores = np.asarray(lists.scores[group])
        wrong = sum(
            max(0.0, means[i] - means[j]) for i in order for j in order if scores[i] < scores[j]
        )
        expected.append(wrong - 0.5 * means[order[0]])
    np.testing.assert_allclose(rrhf(lists, np.float32(0.5)), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_a_ranking_is_one_choice_after_another(seed):
    lists, expected = random_lists(seed), []
    for group in range(3):
        order, _, ratios = by_hand(lists, group)
        strengths = np.exp(0.1 * ratios[order])
        chances = [strengths[k] / strengths[k:].sum() for k in range(len(order))]
        expected.append(-np.log(chances).sum())
    np.testing.assert_allclose(plackett_luce(lists, np.float32(0.1)), expected, rtol=1e-5)


def pairs_and_lists() -> tuple[Pairs, ranking.Lists]:
    """The same pairs in both forms, the chosen one first in some lists and second in others."""
    rng = np.random.default_rng(1)
    w, l, ref_w, ref_l = (-rng.gamma(4.0, 2.0, (4, 6))).astype(np.float32)
    n_w, n_l = rng.integers(1, 9, (2, 6)).astype(np.float32)
    swap = np.arange(6) % 2 == 0

    def side_by_side(one, other):
        return np.stack([np.where(swap, other, one), np.where(swap, one, other)], axis=-1)

    scores = side_by_side(np.full(6, 2.0, np.float32), np.full(6, -1.0, np.float32))
    arrays = (side_by_side(w, l), side_by_side(ref_w, ref_l), side_by_side(n_w, n_l), scores)
    return (
        Pairs(w, l, ref_w, ref_l, n_w, n_l, np.full(6, 1 / 6, np.float32)),
        ranking.Lists(*arrays, np.ones((6, 2), bool)),
    )


def test_of_two_completions_they_are_the_losses_of_pairs():
    pairs, lists = pairs_and_lists()
    sigmoid, best = jax.jit(lambda p: (preference.sigmoid(p, 0.1), preference.rrhf(p)))(pairs)
    np.testing.assert_allclose(plackett_luce(lists, np.float32(0.1)), sigmoid, rtol=1e-5)
    np.testing.assert_allclose(rrhf(lists), best, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.rrhf])
def test_gradients_are_finite_and_none_goes_to_what_is_not_there(loss, size):
    lists = random_lists()
    gradient = slope(loss)(np.float32(size) * np.asarray(lists.logprobs), lists)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~MASK].any()


ROWS = [
    {"prompt": f"say {i}", "completions": ["ab", f"no {i}", "ab ab"][: 2 + i % 2], "scores": scores}
    for i in range(8)
    for scores in [[2.0, 0.0, 1.0][: 2 + i % 2]]
]


@pytree
class NarrowReference:
    params: Any

    def __call__(self, batch, where=None):
        return bigram.Narrow()(self.params, batch, None, where)


def narrow():
    """A policy that needs no model, its reference, and its params."""
    params = bigram.narrow_params()
    return bigram.Narrow(), NarrowReference(params), params


def decoder():
    model = tj.models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())
    method = tj.peft.lora(rank=4)
    start = method.init(jax.random.key(0), model.params)
    return tj.policy(model, method), tj.reference(model), start


@pytest.mark.parametrize("loss", [ranking.plackett_luce, ranking.rrhf])
@pytest.mark.parametrize("setting", [narrow, pytest.param(decoder, marks=pytest.mark.slow)])
def test_a_policy_learns_the_order_of_lists_of_unequal_length(setting, loss):
    policy, reference, start = setting()
    objective = tj.losses.listwise(policy, None if loss is ranking.rrhf else reference, loss)
    batches = tj.data.preferences(ROWS, toy.tokenizer(), batch_size=8, max_length=64)
    tx = optax.adam(2e-2)
    step, state = tj.train.make_step(tx), tj.train.init(start, tx)
    records = []
    for _ in range(12 if setting is decoder else 40):
        batch = next(batches)
        if setting is narrow:
            batch = batch | {"tokens": np.asarray(batch["tokens"]) % bigram.WIDE}
        state, metrics = step(state, objective, batch)
        records.append({name: float(value) for name, value in metrics.items()})
    assert records[-1]["loss"] < records[0]["loss"] - 0.05
    assert records[-1]["best_accuracy"] == 1


def test_batches_without_scores_are_refused():
    loss = tj.losses.listwise(lambda *args, **kwargs: None, None)
    with pytest.raises(ValueError, match=r"no scores.*prompt, completions, scores"):
        loss({}, {"completions": jnp.ones((1, 2), int), "groups": jnp.ones((1, 1))})


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"bata": 0.1}, "plackett_luce has no coefficient 'bata'; did you mean 'beta'"),
        ({"beta": 0.0}, "beta=0.0: it is above 0"),
    ],
)
def test_coefficients_that_mean_nothing_are_refused(coefficients, message):
    with pytest.raises(ValueError, match=message):
        tj.losses.listwise(bigram.Narrow(), None, ranking.plackett_luce, **coefficients)

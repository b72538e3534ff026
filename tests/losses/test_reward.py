"""Reward models: likelihoods in float64 as the papers write them, TRL's loss, calibration by hand."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.losses import bradley_terry
from trainjax.losses.reward import (
    bounding,
    brier_score,
    davidson_nll,
    expected_calibration_error,
    pair_nll,
    plackett_luce_nll,
    rao_kupper_nll,
    uncertainty_penalised,
    weighted_objectives,
    worst_case,
)
from trainjax.types import Loss, pytree

GOLDEN = json.loads((helpers.GOLDEN / "reward.json").read_text())
TIED = np.array([False, True, False, True])
MASK = np.array([[True, True, True, True], [True, False, True, False], [False] * 4])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- likelihoods ------------------------------------------------------------------------------------


def bradley_terry_form(scores: np.ndarray) -> np.ndarray:
    strengths = np.exp(scores)
    return -np.log(strengths[0] / (strengths[0] + strengths[1] * np.exp(0.3)))


def rao_kupper_form(scores: np.ndarray) -> np.ndarray:
    """`p_w / (p_w + theta p_l)`, and `(theta^2 - 1) p_w p_l / ((p_w + theta p_l)(theta p_w + p_l))`."""
    (w, l), theta = np.exp(scores), np.exp(0.4)
    tie = (theta**2 - 1) * w * l / ((w + theta * l) * (theta * w + l))
    return -np.log(np.where(TIED, tie, w / (w + theta * l)))


def davidson_form(scores: np.ndarray) -> np.ndarray:
    """`p_w / (p_w + p_l + nu sqrt(p_w p_l))`, and `nu sqrt(p_w p_l)` over the same."""
    (w, l), nu = np.exp(scores), np.exp(-0.7)
    even = nu * np.sqrt(w * l)
    return -np.log(np.where(TIED, even, w) / (w + l + even))


def plackett_luce_form(scores: np.ndarray) -> np.ndarray:
    """One choice after another from those that are left."""
    losses = []
    for group, mask in zip(scores, MASK, strict=True):
        strengths = np.exp(group[mask])
        chances = [strengths[i] / strengths[i:].sum() for i in range(len(strengths))]
        losses.append(-np.log(chances).sum())
    return np.array(losses)


def bounding_form(scores: np.ndarray) -> np.ndarray:
    chosen, rejected = scores
    return -np.log(sigmoid(1.5 - chosen)) - np.log(sigmoid(1.5 + rejected))


LIKELIHOODS: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray], tuple]] = {
    "bradley_terry": (lambda s: pair_nll(s[0], s[1], 0.3), bradley_terry_form, (2, 4)),
    "bounding": (lambda s: bounding(s[0], s[1], 1.5), bounding_form, (2, 4)),
    "rao_kupper": (
        lambda s: rao_kupper_nll(s[0], s[1], jnp.asarray(TIED), 0.4),
        rao_kupper_form,
        (2, 4),
    ),
    "davidson": (
        lambda s: davidson_nll(s[0], s[1], jnp.asarray(TIED), -0.7),
        davidson_form,
        (2, 4),
    ),
    "plackett_luce": (
        lambda s: plackett_luce_nll(s, jnp.asarray(MASK)),
        plackett_luce_form,
        (3, 4),
    ),
}
"""Our function of scores, the paper's in strengths `e^score`, and the scores' shape."""

EACH = pytest.mark.parametrize("name", LIKELIHOODS)


@functools.cache
def losses_and_slope(name: str) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """Of scores: each loss, and the gradient of the sum."""
    ours, *_ = LIKELIHOODS[name]
    return jax.jit(lambda scores: (ours(scores), jax.grad(lambda s: jnp.sum(ours(s)))(scores)))


@EACH
def test_likelihoods_are_the_papers_and_have_their_gradients_by_finite_differences(name):
    _, form, shape = LIKELIHOODS[name]
    scores, step = np.random.default_rng(3).standard_normal(shape), 1e-6
    losses, gradient = jax.device_get(losses_and_slope(name)(scores.astype(np.float32)))
    np.testing.assert_allclose(losses, form(scores), rtol=1e-5, atol=1e-6)
    for place in np.ndindex(shape):
        nudge = np.zeros(shape)
        nudge[place] = step
        slope = (form(scores + nudge) - form(scores - nudge)).sum() / (2 * step)
        np.testing.assert_allclose(gradient[place], slope, rtol=0, atol=1e-6)


@EACH
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_likelihoods_and_gradients_are_finite_at_scores_of_ten_thousand(name, sign):
    *_, shape = LIKELIHOODS[name]
    scores = np.float32(sign * np.linspace(-1e4, 1e4, np.prod(shape)).reshape(shape))
    losses, gradient = losses_and_slope(name)(scores)
    assert np.isfinite(np.sum(losses))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() <= 4.0  # each comparison moves a score by at most 1


def test_with_ties_the_chances_of_all_outcomes_sum_to_one():
    r, s = jnp.asarray([0.3, -2.0, 5.0]), jnp.asarray([0.1, 1.0, 5.0])
    no, yes = jnp.zeros(3, bool), jnp.ones(3, bool)
    for nll, number in ((rao_kupper_nll, 0.8), (davidson_nll, -1.2)):
        outcomes = nll(r, s, no, number), nll(s, r, no, number), nll(r, s, yes, number)
        np.testing.assert_allclose(sum(jnp.exp(-x) for x in outcomes), 1.0, rtol=1e-6)


def test_chances_of_all_rankings_sum_to_one():
    scores = jnp.asarray(list(itertools.permutations([0.5, -1.0, 2.0, 0.0])))
    losses = plackett_luce_nll(scores, jnp.ones(scores.shape, bool))
    np.testing.assert_allclose(jnp.sum(jnp.exp(-losses)), 1.0, rtol=1e-6)


def test_a_ranking_of_two_is_bradley_terry_and_of_one_or_none_is_certain():
    scores = jnp.asarray([[1.5, -0.5], [1.5, -0.5], [1.5, -0.5]])
    mask = jnp.asarray([[True, True], [False, True], [False, False]])
    found = plackett_luce_nll(scores, mask)
    np.testing.assert_allclose(found, [pair_nll(scores[0, 0], scores[0, 1]), 0.0, 0.0], rtol=1e-6)


def test_ties_almost_never_are_bradley_terry():
    chosen, rejected = jnp.asarray([0.3, -4.0]), jnp.asarray([1.0, 2.0])
    expected = pair_nll(chosen, rejected)
    for nll, number in ((rao_kupper_nll, 1e-7), (davidson_nll, -30.0)):
        np.testing.assert_allclose(
            nll(chosen, rejected, jnp.zeros(2, bool), number), expected, rtol=1e-6
        )


def test_ties_parameters_train():
    """Their gradients, by finite differences of the papers' forms; ties where there are none to see."""
    chosen, rejected, tied = (
        jnp.asarray([0.5, 1.0]),
        jnp.asarray([0.2, 3.0]),
        jnp.asarray([True, False]),
    )
    for nll, number in ((rao_kupper_nll, 0.4), (davidson_nll, -0.7)):
        f = jax.jit(lambda x, nll=nll: jnp.sum(nll(chosen, rejected, tied, x)))
        slope = jax.jit(jax.grad(f))(np.float32(number))
        up, down = (helpers.in_float64(f, np.float64(number + h)) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-3)


# --- many scores made one ---------------------------------------------------------------------------


def test_ensembles_take_the_lowest_score_or_pay_for_the_unbiased_variance():
    scores = jnp.asarray([[1.0, -1.0], [2.0, 5.0], [6.0, 2.0]])
    np.testing.assert_array_equal(worst_case(scores), [1.0, -1.0])
    # means 3 and 2; squared deviations 4 + 1 + 9 and 9 + 9 + 0, over 2
    np.testing.assert_allclose(uncertainty_penalised(scores, 0.5), [3 - 3.5, 2 - 4.5], rtol=1e-6)
    np.testing.assert_allclose(uncertainty_penalised(scores, 0.0), [3.0, 2.0], rtol=1e-6)


def test_an_ensemble_of_one_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="1 members have no variance"):
        uncertainty_penalised(jnp.ones((1, 3)), 0.5)


def test_objectives_are_weighed_before_or_after_the_likelihood():
    """As rewards, `r = w . v`; as losses, each objective with its own comparison."""
    rewards = jnp.asarray([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    weights = jnp.asarray([0.5, 0.25, 2.0])
    np.testing.assert_allclose(weighted_objectives(rewards, weights), [1.0, 2.75], rtol=1e-6)
    each = pair_nll(rewards[0], rewards[1])
    expected = (np.log1p(np.exp(-np.array([1.0, -5.0, -0.5]))) * weights).sum()
    np.testing.assert_allclose(weighted_objectives(each, weights), expected, rtol=1e-6)


# --- evaluation -------------------------------------------------------------------------------------


def test_calibration_error_is_that_of_a_count_by_hand():
    """Four bins: (0, .25] has .1 and .25 and came never and once; (.5, .75] has .6 and .7, both came."""
    probabilities = jnp.asarray([0.1, 0.25, 0.6, 0.7])
    outcomes, weights = jnp.asarray([False, True, True, True]), jnp.full(4, 0.25)
    found = expected_calibration_error(probabilities, outcomes, weights, bins=4)
    np.testing.assert_allclose(found, 0.5 * abs(0.5 - 0.175) + 0.5 * abs(1 - 0.65), rtol=1e-6)


def test_calibration_error_of_many_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(0)
    p, weights = rng.random(500).astype(np.float32), rng.random(500).astype(np.float32)
    weights /= weights.sum()
    came = rng.random(500) < p**2
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (p > low) & (p <= low + 1 / 15)
        share = weights[inside].sum()
        gap = (weights * came)[inside].sum() / share - (weights * p)[inside].sum() / share
        expected += share * abs(gap)
    given = jnp.asarray(p), jnp.asarray(came), jnp.asarray(weights)
    found = expected_calibration_error(*given, bins=15)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_certain_and_right_forecasts_have_no_calibration_error_and_certain_and_wrong_ones_all():
    p, weights = jnp.asarray([0.0, 1.0]), jnp.full(2, 0.5)
    for came, expected in (([False, True], 0.0), ([True, False], 1.0)):
        assert float(expected_calibration_error(p, jnp.asarray(came), weights)) == expected
        assert float(brier_score(p, jnp.asarray(came), weights)) == expected


def test_brier_score_is_the_mean_squared_error_of_the_chances():
    p, came = jnp.asarray([0.5, 0.2, 0.9]), jnp.asarray([True, True, False])
    found = brier_score(p, came, jnp.asarray([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(found, 0.5 * 0.25 + 0.25 * 0.64 + 0.25 * 0.81, rtol=1e-6)


# --- the loss ---------------------------------------------------------------------------------------


def given_scores(params, batch, key):
    """The params are the scores."""
    return params


def linear_scores(params, batch, key):
    """Of features in the batch."""
    return batch["features"] @ params


@pytree
class Shifted:
    """Scores plus an array of its own."""

    shift: Any

    def __call__(self, params, batch, key):
        return params + self.shift


@jax.jit
def value_and_gradient(loss: Loss, params: Any, batch: Any) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(params, batch)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_loss_gradient_and_metrics_are_those_that_trl_gave(name):
    case = GOLDEN["cases"][name]
    batch = {"groups": np.full((8, 1), 1 / 8, np.float32)}
    if case["margins"] is not None:
        batch["margins"] = np.array(case["margins"], np.float32)[:, None]
    scores = jnp.asarray(case["scores"], jnp.float32)[:, None]
    loss = bradley_terry(given_scores, center_rewards_coefficient=case["coefficient"])
    (value, metrics), gradient = value_and_gradient(loss, scores, batch)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], case["gradient"], rtol=1e-5, atol=1e-7)
    for name, expected in case["metrics"].items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_goldens_are_what_trl_gives():
    from tests.golden import make_reward

    for name, settings in make_reward.CASES.items():
        found, expected = make_reward.golden(**settings), GOLDEN["cases"][name]
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=1e-5, atol=1e-8)


def test_slots_without_a_pair_count_for_nothing_even_with_scores_that_are_not_finite():
    scores = jnp.asarray([[[1.0, 0.0], [jnp.nan, jnp.inf]]])
    batch = {"groups": jnp.asarray([[1.0, 0.0]])}
    (value, metrics), gradient = value_and_gradient(bradley_terry(given_scores), scores, batch)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1.0)), rtol=1e-6)
    assert not gradient[0, 1].any()
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_micro_batches_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    groups = rng.random((8, 3)) * (rng.random((8, 3)) < 0.8)
    batch = {
        "features": rng.standard_normal((8, 3, 2, 5)).astype(np.float32),
        "groups": (groups / groups.sum()).astype(np.float32),
        "margins": rng.random((8, 3)).astype(np.float32),
    }
    params = {"w": jnp.asarray(rng.standard_normal(5), jnp.float32)}
    loss = bradley_terry(lambda params, batch, key: linear_scores(params["w"], batch, key), 0.1)
    whole, expected = helpers.loss_and_gradients(loss, params, batch)
    value, gradients = helpers.loss_and_gradients(loss, params, batch, 4)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    helpers.assert_close(gradients, expected, 1e-6)


def test_arrays_of_the_scoring_function_and_the_coefficient_are_inputs():
    traces = []

    @jax.jit
    def run(loss, params, batch):
        traces.append(loss)
        return loss(params, batch)[0]

    scores, batch = jnp.asarray([[[1.0, 0.0]]]), {"groups": jnp.ones((1, 1))}
    values = [
        float(run(bradley_terry(Shifted(jnp.float32(shift)), coefficient), scores, batch))
        for shift, coefficient in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5))
    ]
    lost = np.log1p(np.exp(-1.0))  # the centre: (2 + 1)^2
    np.testing.assert_allclose(values, [lost, lost, lost + 0.5 * 9], rtol=1e-6)
    assert len(traces) == 1


def test_scores_far_beyond_the_bound_are_pulled_back_and_others_told_apart():
    """Of a right pair: within the bound the scores drift apart, beyond it they come back."""
    batch = {"groups": jnp.ones((1, 1))}
    for size, sign in ((0.1, -1.0), (8.0, 1.0)):
        scores = jnp.asarray([[[size, -size]]])
        gradient = value_and_gradient(bradley_terry(given_scores, score_bound=3.0), scores, batch)[
            1
        ]
        np.testing.assert_array_equal(np.sign(gradient[0, 0]), [sign, -sign])


def test_what_is_no_pair_or_no_coefficient_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="center_rewards_coefficient=-0.1 drives scores apart"):
        bradley_terry(given_scores, center_rewards_coefficient=-0.1)
    with pytest.raises(ValueError, match="score_bound=0.0 leaves scores no room"):
        bradley_terry(given_scores, score_bound=0.0)
    batch = {"groups": jnp.ones((1, 1))}
    with pytest.raises(
        ValueError, match=r"scores of shape \(1, 1, 3\).*`plackett_luce_nll` ranks more"
    ):
        value_and_gradient(bradley_terry(given_scores), jnp.ones((1, 1, 3)), batch)

"""Weights of examples from their losses: each formula in float64, and what they do to a policy's loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from tests import bigram, helpers
from trainjax.losses import (
    hard_self_paced,
    hardest,
    lin_upper,
    reweigh,
    reweighted,
    sft,
    skill_weights,
    soft_self_paced,
    top_k,
)
from trainjax.losses import reweight as r
from trainjax.train import init, make_step


def examples(count: int = 7, seed: int = 0, absent: int = 2):
    """Losses of some examples and their priors; the last places hold none."""
    rng = np.random.default_rng(seed)
    losses, priors = rng.exponential(2.0, count), rng.uniform(0.5, 1.5, count)
    losses[count - absent :] = priors[count - absent :] = 0.0
    return losses.astype(np.float32), (priors / priors.sum()).astype(np.float32)


# --- the formulas ------------------------------------------------------------------------------


def lin_upper_in_float64(losses, priors, temperature):
    l, p = np.float64(losses[priors > 0]), np.float64(priors[priors > 0])
    h = 2 * l / (l.max() - l.min()) - (l.max() + l.min()) / (l.max() - l.min())
    w = p * np.exp(np.minimum(h + 1, 1) / temperature)
    out = np.zeros(len(losses))
    out[priors > 0] = w / w.sum()
    return out


def paced_in_float64(factor):
    def weights(losses, priors, threshold):
        w = np.float64(priors) * factor(np.float64(losses), threshold)
        return w / w.sum()

    return weights


def top_k_in_float64(losses, priors, k):
    there = np.flatnonzero(priors > 0)
    kept = there[np.argsort(-losses[there], kind="stable")[:k]]
    w = np.where(np.isin(np.arange(len(losses)), kept), np.float64(priors), 0.0)
    return w / w.sum()


FORMULAS = {
    "lin_upper": (r.lin_upper_weights, lin_upper_in_float64, (0.3, 1.0, 10.0)),
    "hard": (r.hard_weights, paced_in_float64(lambda l, t: l < t), (1.0, 2.5, 99.0)),
    "soft": (r.soft_weights, paced_in_float64(lambda l, t: np.maximum(0, 1 - l / t)), (1.5, 9.0)),
    "top_k": (r.top_k_weights, top_k_in_float64, (1, 3, 5)),
}


@pytest.mark.parametrize(("weigh", "formula", "values"), FORMULAS.values(), ids=FORMULAS)
def test_weights_are_the_formulas_in_float64_and_sum_to_one(weigh, formula, values):
    weigh = jax.jit(weigh)
    for seed in range(50):
        losses, priors = examples(seed=seed)
        for value in values:
            if formula is not top_k_in_float64 and value < 2 and not (losses[:5] < value).any():
                continue  # nothing is easy enough: the next test's case
            found = np.asarray(weigh(losses, priors, value))
            np.testing.assert_allclose(found, formula(losses, priors, value), rtol=0, atol=1e-6)
            assert found.sum() == pytest.approx(1, abs=1e-6)
            assert (found[priors == 0] == 0).all()


@pytest.mark.parametrize(("weigh", "formula", "values"), FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("losses", [[0, 0, 0], [1e8, 1e8, 1e8], [0, 1e-8, 1e8], [2, 2, 2]], ids=str)
def test_weights_of_extreme_and_of_equal_losses_are_finite_and_a_distribution(
    weigh, formula, values, losses
):
    for priors in ([0.5, 0.25, 0.25], [1.0, 0, 0], [0.0, 0, 0]):
        found = weigh(jnp.asarray(losses, jnp.float32), jnp.asarray(priors), values[-1])
        assert float(found.sum()) == pytest.approx(1, abs=1e-6) or float(found.sum()) == 0
        assert (np.asarray(found) >= 0).all()
        if weigh in (r.lin_upper_weights, r.top_k_weights):
            assert float(found.sum()) == pytest.approx(sum(priors), abs=1e-6)


def test_equal_losses_leave_the_priors_to_linupper_and_self_paced_learning():
    losses, priors = jnp.full(4, 2.0), jnp.asarray([0.1, 0.2, 0.3, 0.4])
    for found in (
        r.lin_upper_weights(losses, priors, 1.0),
        r.hard_weights(losses, priors, 3.0),
        r.soft_weights(losses, priors, 3.0),
    ):
        np.testing.assert_allclose(found, priors, rtol=1e-6)


def test_skill_weights_are_the_missing_skills_of_an_example():
    """Skills missing 3 times in 4 and 1 time in 4: examples with the first, both, the second, none."""
    skills = jnp.asarray([[1.0, 0], [1, 1], [0, 1], [0, 0]])
    found = skill_weights(skills, jnp.asarray([0.75, 0.25]), jnp.full(4, 0.25))
    np.testing.assert_allclose(found, [0.375, 0.5, 0.125, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lin_upper(temperature=0.0), "temperature=0.0 .* above 0"),
        (lambda: lin_upper(burn_in=-1), "burn_in=-1"),
        (lambda: top_k(0), "k=0 keeps no example"),
        (lambda: hard_self_paced(0.0), "threshold=0.0 lets no example through"),
        (lambda: soft_self_paced(-1.0), "threshold=-1.0"),
    ],
)
def test_coefficients_without_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- examples of a batch -----------------------------------------------------------------------


def packed_and_padded():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 61, size).astype(np.int32) for size in (7, 3, 9, 2, 5, 6)]
    rows = [[0, 1, 4], [2, 3], [5], [], [], []], [[i] for i in range(6)]
    return [helpers.packed(tokens, layout, seq=16) for layout in rows]  # of one shape


PARAMS = bigram.params()


def row_losses(batch):
    """Loss and gradient of each row by itself, and its prior."""
    gradient, found = jax.jit(jax.value_and_grad(sft(bigram.policy), has_aux=True)), []
    for row in range(len(batch["weights"])):
        one = {name: array[row : row + 1] for name, array in batch.items()}
        prior = one["weights"].sum()
        (loss, _), slope = gradient(PARAMS, one | {"weights": one["weights"] / prior})
        found.append((loss, slope, prior))
    losses, gradients, priors = zip(*found, strict=True)
    return np.array(losses), gradients, np.array(priors)


def test_reweighted_is_the_weighted_sum_of_the_examples_and_weights_have_no_gradient():
    _, padded = packed_and_padded()
    losses, gradients, priors = row_losses(padded)
    w = lin_upper_in_float64(losses, priors, 0.5)
    found = helpers.loss_and_gradients(reweighted(bigram.policy, lin_upper(0.5)), PARAMS, padded)
    assert found[0] == pytest.approx(w @ losses, rel=1e-5)
    expected = {
        name: sum(a * g[name] for a, g in zip(w, gradients, strict=True)) for name in found[1]
    }
    helpers.assert_close(found[1], expected, 1e-5)


@pytest.mark.parametrize(
    "weigh",
    [lin_upper(0.5), hard_self_paced(4.0), soft_self_paced(6.0), top_k(3)],
    ids=["lin_upper", "hard", "soft", "top_k"],
)
def test_packed_examples_weigh_what_rows_do(weigh):
    packed, padded = packed_and_padded()
    wanted = helpers.loss_and_gradients(reweighted(bigram.policy, weigh), PARAMS, padded)
    found = helpers.loss_and_gradients(reweighted(bigram.policy, weigh), PARAMS, packed)
    plain = helpers.loss_and_gradients(sft(bigram.policy), PARAMS, padded)
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert abs(found[0] - plain[0]) > 1e-3
    helpers.assert_close(found[1], wanted[1], 1e-5)


def test_a_weighing_that_gives_the_priors_back_is_sft_with_any_micro_batches():
    batch = helpers.random_batch(rows=4)
    loss = reweighted(bigram.policy, lambda losses, priors, step: priors / priors.sum())
    wanted = helpers.loss_and_gradients(sft(bigram.policy), PARAMS, batch)
    for accumulate in (1, 2, 4):
        found = helpers.loss_and_gradients(loss, PARAMS, batch, accumulate)
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
        helpers.assert_close(found[1], wanted[1], 1e-5)


def test_reweigh_compares_the_whole_batch_whatever_its_micro_batches():
    packed, _ = packed_and_padded()
    packed = {name: array[[0, 1, 2, 0]] for name, array in packed.items()}
    packed["weights"] = packed["weights"] / packed["weights"].sum()
    new = jax.jit(reweigh)(bigram.policy, lin_upper(0.5), PARAMS, packed)
    assert float(new["weights"].sum()) == pytest.approx(1, abs=1e-6)
    wanted = helpers.loss_and_gradients(reweighted(bigram.policy, lin_upper(0.5)), PARAMS, packed)
    for accumulate in (1, 2, 4):
        found = helpers.loss_and_gradients(sft(bigram.policy), PARAMS, new, accumulate)
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
        helpers.assert_close(found[1], wanted[1], 1e-5)


def test_hardest_keeps_the_rows_of_largest_loss_at_a_fixed_size():
    _, batch = packed_and_padded()
    losses, _, priors = row_losses(batch)
    kept = np.sort(np.argsort(-losses)[:3])
    smaller = jax.jit(hardest, static_argnums=3)(bigram.policy, PARAMS, batch, 3)
    np.testing.assert_array_equal(smaller["tokens"], batch["tokens"][kept])
    assert smaller["segments"].shape == (3, 16)
    loss, _ = sft(bigram.policy)(PARAMS, smaller)
    np.testing.assert_allclose(loss, losses[kept] @ priors[kept] / priors[kept].sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="size=7 .* which has 6"):
        hardest(bigram.policy, PARAMS, batch, 7)


# --- in training -------------------------------------------------------------------------------


def test_burn_in_and_thresholds_follow_the_step_in_one_program():
    """LinUpper begins at the second step; the threshold lets nothing, then all through."""
    batch, tx = helpers.random_batch(rows=4), optax.sgd(0.0)
    traces = []

    def counted(weigh, losses, priors, step):
        traces.append(1)
        return weigh(losses, priors, step)

    step, state, found, first = make_step(tx), init(PARAMS, tx), [], 0
    for number in range(4):
        loss = reweighted(bigram.policy, Partial(counted, lin_upper(0.5, burn_in=2)))
        state, metrics = step(state, loss, batch)
        found.append((float(metrics["loss"]), float(metrics["unweighted_loss"])))
        first = len(traces) if number == 0 else first
    assert len(traces) == first
    assert [abs(a - b) > 1e-3 for a, b in found] == [False, False, True, True]

    paced = reweighted(bigram.policy, hard_self_paced(lambda count: 1e-3 + 1e3 * count))
    state, kept = init(PARAMS, tx), []
    for _ in range(2):
        state, metrics = step(state, paced, batch)
        kept.append((float(metrics["kept"]), float(metrics["loss"])))
    assert kept[0] == (0.0, 0.0)
    assert kept[1][0] == pytest.approx(1, abs=1e-6)
    assert kept[1][1] == pytest.approx(found[0][1], rel=1e-6)


def test_another_temperature_and_burn_in_are_the_same_program():
    batch = helpers.random_batch(rows=4) | {"step": np.int32(5)}
    values = [
        jax.tree.structure(reweighted(bigram.policy, lin_upper(t, n)))
        for t, n in ((1.0, 3), (0.5, 9))
    ]
    assert values[0] == values[1]
    loss = jax.jit(lambda loss, params, batch: loss(params, batch)[0])
    found = {
        float(loss(reweighted(bigram.policy, lin_upper(t)), PARAMS, batch)) for t in (1.0, 0.1)
    }
    assert len(found) == 2
    assert loss._cache_size() == 1

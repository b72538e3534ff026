"""TIES: what stays of a task vector, and which sign wins."""

import numpy as np
import pytest

from tests.tensors import base_and_models
from trainjax import merging
from trainjax.merging import Block, merge_tensor

A, B = np.float32([1, -2, 3, 0.5]), np.float32([2, 2, -1, -0.25])
ZERO = np.zeros(4, np.float32)
CONSENSUS = pytest.mark.parametrize("consensus", [merging.weighted_mean, merging.counted_mean])


@CONSENSUS
def test_the_known_case(consensus):
    """Trimmed to [0,-2,3,0] and [2,2,0,0]; the signs are +, + (a sum of 0), +, and nobody's."""
    method = merging.ties([1.0, 1.0], 0.5, consensus=consensus)
    np.testing.assert_array_equal(merge_tensor(method, ZERO, [A, B]), [2, 2, 3, 0])


@CONSENSUS
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.99, 1.0])
def test_of_one_model_the_largest_entries_stay(consensus, density):
    base, (model,) = base_and_models(0, 1, (7, 9))
    method = merging.ties([1.0], density, consensus=consensus)
    found = merge_tensor(method, base, [model]) - base
    delta = model - base
    stays = np.zeros(63, bool)
    stays[np.argsort(-np.abs(delta), axis=None)[: int(density * 63)]] = True
    expected = np.where(stays.reshape(7, 9), delta, 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_of_equal_entries_the_first_stay_so_that_the_number_is_exact(rows):
    delta = np.float32([[1, -1, 2], [1, 1, -1], [1, 0, 1], [3, -1, 1]])
    blocks = [
        Block("w", 3 * i, np.zeros_like(delta[i : i + rows]), [delta[i : i + rows]])
        for i in range(0, 4, rows)
    ]
    method = merging.ties([1.0], 0.5)
    measured = method.measure(blocks)
    found = np.concatenate([method.combine(block, measured) for block in blocks])
    np.testing.assert_array_equal(found, [[1, -1, 2], [1, 1, 0], [0, 0, 0], [3, 0, 0]])


def test_at_least_one_entry_stays():
    found = merge_tensor(merging.ties([1.0], 0.01), ZERO, [A])
    np.testing.assert_array_equal(found, [0, 0, 3, 0])


def test_the_sign_is_elected_by_weight_and_the_mean_is_weighted():
    """By entry: 3 - 4 < 0; 2 of weight 1 and 1 of weight 2; 1 alone; nobody."""
    a, b = np.float32([3, 2, 1, 0]), np.float32([-2, 1, -0.1, 0])
    found = merge_tensor(merging.ties([1.0, 2.0], 1.0), ZERO, [a, b])
    np.testing.assert_allclose(found, [-2, 4 / 3, 1, 0], rtol=1e-6)


def test_counted_weights_scale_and_have_no_vote():
    """By entry: 3 - 2 > 0; (2 + 2) / 2; 1 alone; nobody."""
    a, b = np.float32([3, 2, 1, 0]), np.float32([-2, 1, -0.1, 0])
    method = merging.ties([1.0, 2.0], 1.0, consensus=merging.counted_mean)
    np.testing.assert_allclose(merge_tensor(method, ZERO, [a, b]), [3, 2, 1, 0], rtol=1e-6)


def test_a_negative_weight_turns_a_task_vector_round():
    found = merge_tensor(merging.ties([-1.0], 1.0), ZERO, [A])
    np.testing.assert_array_equal(found, -A)


def test_lambda_multiplies_the_merged_difference():
    base, models = base_and_models(1)
    weights = [1.0, 2.0, 0.5]
    once, thrice = (
        merge_tensor(merging.ties(weights, 0.5, scale=scale), base, models) - base
        for scale in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice, 3 * once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [merging.ties, merging.dare_linear, merging.dare_ties])
@pytest.mark.parametrize("density", [0.0, -0.5, 1.01, float("nan")])
def test_a_density_outside_is_refused(make, density):
    with pytest.raises(ValueError, match=rf"density={density} is not in \(0, 1\]"):
        make([1.0], density)

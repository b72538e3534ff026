"""What every method of merging does, and the values that mergekit gives (`golden/make_merging.py`)."""

import json

import numpy as np
import pytest

from tests import helpers
from tests.tensors import GOLDEN_CASES, base_and_models
from trainjax import merging
from trainjax.merging import Block, merge_tensor

METHODS = {
    "linear": merging.linear([1.0, 0.5]),
    "task_arithmetic": merging.task_arithmetic([1.0, -0.5]),
    "ties": merging.ties([1.0, 0.5], 0.4),
    "ties_counted": merging.ties([1.0, 0.5], 0.4, consensus=merging.counted_mean),
    "dare_linear": merging.dare_linear([1.0, 0.5], 0.4),
    "dare_ties": merging.dare_ties([1.0, 0.5], 0.4),
    "slerp": merging.slerp(0.3),
    "model_stock": merging.model_stock(),
    "instruction_residual": merging.instruction_residual(0.6),
    "timber": merging.timber(0.2),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def inputs(method, seed=0, shape=(6, 8)):
    """A base, if the method has one, and as many models as it takes."""
    base, models = base_and_models(seed, method.most or 3, shape)
    return (base if method.needs_base else None), models


@EVERY
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9,), (4, 3, 2)], ids=str)
def test_merging_in_blocks_is_merging_the_whole(method, shape):
    base, models = inputs(method, shape=shape)
    whole = merge_tensor(method, base, models, "w")
    assert (whole.shape, whole.dtype) == (shape, np.float32)
    row = int(np.prod(shape[1:]))
    blocks = [
        Block(
            "w",
            first * row,
            None if base is None else base[first : first + 2],
            [model[first : first + 2] for model in models],
        )
        for first in range(0, shape[0], 2)
    ]
    measured = method.measure(blocks)
    parts = np.concatenate([method.combine(block, measured) for block in blocks])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


@EVERY
def test_models_that_are_the_base_merge_to_it(method):
    base, models = base_and_models(0, method.most or 3)
    start = base if method.needs_base else None
    found = merge_tensor(method, start, [base.copy() for _ in models])
    np.testing.assert_allclose(found, base, rtol=0, atol=1e-6)


@EVERY
def test_what_is_merged_stays_as_it_was(method):
    base, models = inputs(method)
    before = [tensor.copy() for tensor in models]
    start = None if base is None else base.copy()
    merge_tensor(method, base, models)
    for model, old in zip(models, before, strict=True):
        np.testing.assert_array_equal(model, old)
    if base is not None:
        np.testing.assert_array_equal(base, start)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in GOLDEN_CASES.items() for case in range(len(cases))],
)
def test_values_are_those_of_mergekit(name, case):
    golden = json.loads((helpers.GOLDEN / "merging.json").read_text())["values"]
    method = getattr(merging, name)(**GOLDEN_CASES[name][case])
    for seed, expected in enumerate(golden[name][case]):
        base, models = base_and_models(seed)
        if name == "slerp":
            models = models[:2]
        found = merge_tensor(method, base if method.needs_base else None, models)
        np.testing.assert_allclose(found.reshape(-1), expected, rtol=0, atol=2e-6)


class TestTaskArithmetic:
    def test_it_is_the_base_plus_weighted_differences(self):
        base, (a, b) = base_and_models(1, 2)
        found = merge_tensor(merging.task_arithmetic([0.5, -2.0]), base, [a, b])
        wide, *both = (tensor.astype(np.float64) for tensor in (base, a, b))
        expected = wide + 0.5 * (both[0] - wide) - 2.0 * (both[1] - wide)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    def test_negation_takes_back_what_was_learned(self):
        base, (model,) = base_and_models(1, 1)
        learned = merge_tensor(merging.task_arithmetic([1.0]), base, [model])
        negated = merge_tensor(merging.task_arithmetic([-1.0]), base, [model])
        np.testing.assert_allclose((learned + negated) / 2, base, rtol=0, atol=1e-6)


class TestLinear:
    def test_one_model_alone_counts_where_the_others_weigh_nothing(self):
        _, models = base_and_models(2)
        found = merge_tensor(merging.linear([0.0, 1.0, 0.0]), None, models)
        np.testing.assert_array_equal(found, models[1])

    def test_weights_that_sum_to_zero_cannot_be_normalised(self):
        with pytest.raises(ValueError, match=r"weights \(1.0, -1.0\) sum to zero"):
            merging.linear([1.0, -1.0])
        merging.linear([1.0, -1.0], normalize=False)


class TestSlerp:
    @pytest.mark.parametrize("t", [0, 1])
    def test_the_ends_are_the_models_exactly(self, t):
        _, models = base_and_models(3, 2)
        found = merge_tensor(merging.slerp(float(t)), None, models)
        np.testing.assert_array_equal(found, models[t])

    def test_between_vectors_of_one_length_it_keeps_the_length_and_divides_the_angle(self):
        a, b = (np.float32([np.cos(angle), np.sin(angle)]) * 3 for angle in (0.2, 1.4))
        found = merge_tensor(merging.slerp(0.25), None, [a, b])
        np.testing.assert_allclose(found, [3 * np.cos(0.5), 3 * np.sin(0.5)], rtol=1e-6)

    @pytest.mark.parametrize("factor", [2.0, -2.0])
    def test_between_collinear_tensors_it_is_a_straight_line(self, factor):
        _, (a,) = base_and_models(3, 1)
        found = merge_tensor(merging.slerp(0.25), None, [a, factor * a])
        np.testing.assert_allclose(found, a * (0.75 + 0.25 * factor), rtol=1e-6)

    @pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
    def test_a_place_outside_is_refused(self, t):
        with pytest.raises(ValueError, match=f"t={t} is not in"):
            merging.slerp(t)


class TestModelStock:
    def test_models_that_agree_are_averaged_and_those_at_right_angles_are_left(self):
        base = np.zeros(3, np.float32)
        same = [np.float32([1, 2, 2])] * 3
        np.testing.assert_allclose(
            merge_tensor(merging.model_stock(), base, same), same[0], rtol=1e-6
        )
        found = merge_tensor(merging.model_stock(), base, list(np.eye(3, dtype=np.float32)))
        np.testing.assert_array_equal(found, base)

    def test_of_two_models_the_ratio_is_that_of_the_paper(self):
        angle = 0.7
        a, b = np.float32([1, 0]), np.float32([np.cos(angle), np.sin(angle)])
        found = merge_tensor(merging.model_stock(), np.zeros(2, np.float32), [a, b])
        ratio = 2 * np.cos(angle) / (1 + np.cos(angle))
        np.testing.assert_allclose(found, ratio * (a + b) / 2, rtol=1e-6)

    def test_models_that_went_opposite_ways_leave_the_base(self):
        base, (model,) = base_and_models(0, 1)
        found = merge_tensor(merging.model_stock(), base, [model, 2 * base - model])
        np.testing.assert_allclose(found, base, rtol=0, atol=1e-6)


def test_the_instruction_residual_is_added_to_the_base_that_was_trained_further():
    base, (further, instruct) = base_and_models(4, 2)
    found = merge_tensor(merging.instruction_residual(0.5), base, [further, instruct])
    expected = further + 0.5 * (instruct.astype(np.float64) - base)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: merging.linear([weight, 1.0]),
        lambda weight: merging.task_arithmetic([weight]),
        lambda weight: merging.ties([1.0], 0.5, scale=weight),
        lambda weight: merging.dare_ties([weight], 0.5),
        lambda weight: merging.instruction_residual(weight),
    ],
    ids=["linear", "task_arithmetic", "ties", "dare_ties", "instruction_residual"],
)
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(make, weight):
    with pytest.raises(ValueError, match=f"a weight of {weight} is not a finite number"):
        make(weight)

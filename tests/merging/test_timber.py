"""Timber: against a full singular value decomposition in float64."""

import math

import numpy as np
import pytest

from tests.tensors import base_and_models
from trainjax import merging
from trainjax.merging import merge_tensor
from trainjax.merging.timber import effective_rank


def expected(base, instruct, gamma):
    """The authors' program, in NumPy and float64."""
    left, singular, right = np.linalg.svd(instruct.astype(np.float64) - base, full_matrices=False)
    shares = singular / singular.sum()
    rank = math.ceil(np.exp(-np.sum(shares * np.log(shares))))
    assert 0 < rank < len(singular)
    singular[rank:] *= gamma
    return base + (left * singular) @ right


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_directions_beyond_the_effective_rank_are_shrunk(shape, gamma):
    base, (instruct,) = base_and_models(0, 1, shape)
    columns = 0.7 ** np.arange(shape[1], dtype=np.float32)  # singular values that fall
    instruct = base + columns * (instruct - base)
    found = merge_tensor(merging.timber(gamma), base, [instruct])
    np.testing.assert_allclose(found, expected(base, instruct, gamma), rtol=0, atol=2e-6)


def test_with_nothing_shrunk_it_is_the_instruct_model():
    base, (instruct,) = base_and_models(0, 1)
    found = merge_tensor(merging.timber(1.0), base, [instruct])
    np.testing.assert_allclose(found, instruct, rtol=0, atol=1e-6)


def test_vectors_stay_as_they_are_in_the_instruct_model():
    base, (instruct,) = base_and_models(0, 1, (9,))
    np.testing.assert_array_equal(merge_tensor(merging.timber(), base, [instruct]), instruct)


def test_a_change_of_equal_singular_values_is_kept_whole():
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    change = rotation.astype(np.float32)
    found = merge_tensor(merging.timber(), np.zeros((6, 6), np.float32), [change])
    np.testing.assert_allclose(found, change, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("singular", "rank"), [([3.0], 1.0), ([1.0, 1.0, 1.0], 3.0), ([5.0, 0.0], 1.0), ([0.0], 0.0)]
)
def test_the_effective_rank_of_equal_singular_values_is_their_number(singular, rank):
    np.testing.assert_allclose(effective_rank(np.array(singular)), rank, rtol=1e-12)


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_a_gamma_outside_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma={gamma} is not in"):
        merging.timber(gamma)

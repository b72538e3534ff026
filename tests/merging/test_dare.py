"""DARE: what is dropped is random, known from seed and name, and does not change the mean."""

import numpy as np
import pytest

from tests.tensors import base_and_models
from trainjax import merging
from trainjax.merging import merge_tensor
from trainjax.merging.dare import kept


def test_entries_are_dropped_or_divided_by_the_density():
    base, (model,) = base_and_models(0, 1, (50, 40))
    delta = model - base
    found = merge_tensor(merging.dare_linear([1.0], 0.25), base, [model], "w") - base
    dropped = np.abs(found) < 1e-6
    np.testing.assert_allclose(found[~dropped], 4 * delta[~dropped], rtol=1e-3, atol=1e-5)
    # 2000 draws of probability 1/4: 0.0097 is a standard deviation, this is four.
    assert abs((~dropped).mean() - 0.25) < 0.039


def test_the_mean_over_seeds_is_the_model():
    base, (model,) = base_and_models(0, 1, (4, 4))
    copies = 40  # each entry is drawn that often with a seed
    wide, widened = (np.tile(array, (copies, 1)) for array in (base, model))
    method = [merging.dare_linear([1.0], 0.5, seed=seed) for seed in range(50)]
    found = [merge_tensor(each, wide, [widened], "w").reshape(copies, 4, 4) for each in method]
    mean = np.mean(found, axis=(0, 1))
    # An entry's standard deviation is |delta|, and that of the mean of 2000 |delta| / 45.
    assert (np.abs(mean - model) < 5 * np.abs(model - base) / 45).all()


@pytest.mark.parametrize("make", [merging.dare_linear, merging.dare_ties])
def test_a_density_of_one_drops_nothing(make):
    base, (model,) = base_and_models(0, 1)
    np.testing.assert_allclose(merge_tensor(make([1.0], 1.0), base, [model]), model, atol=1e-6)


def test_draws_differ_by_seed_name_and_model_and_by_nothing_else():
    def draw(seed=0, name="w", model=0):
        return kept(seed, name, model, 0, 4096, 0.5)

    first = draw()
    np.testing.assert_array_equal(draw(), first)
    for other in (draw(seed=1), draw(name="v"), draw(model=1)):
        assert abs((other == first).mean() - 0.5) < 0.04  # 4096 coins: five standard deviations


def test_the_draws_of_a_part_are_those_of_the_whole():
    whole = kept(3, "w", 1, 0, 1000, 0.3)
    for start, size in ((0, 7), (7, 1), (13, 500), (999, 1)):
        part = kept(3, "w", 1, start, size, 0.3)
        np.testing.assert_array_equal(part, whole[start : start + size])


def test_the_draws_of_a_release_stay_those_of_the_next():
    """What was merged with a seed can be merged again."""
    bits = np.packbits(kept(1, "model.norm.weight", 0, 0, 32, 0.5))
    assert bits.tobytes().hex() == "fd1009e5"


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1 is negative"):
        merging.dare_linear([1.0], 0.5, seed=-1)

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax.optim import warmup_cosine


def values(schedule, steps):
    return np.asarray([schedule(jnp.asarray(t)) for t in range(steps)], np.float64)


@pytest.mark.parametrize("end", [0.0, 1e-4])
@pytest.mark.parametrize(("warmup", "first"), [(0.0, 0), (5.0, 5), (0.1, 2), (0.26, 5), (19.0, 19)])
def test_it_is_its_formula(warmup, first, end):
    """`first` is the number of warm-up steps in a run of 20."""

    def formula(t):
        if t < first:
            return 1e-3 * t / first
        share = min(1.0, (t - first) / (20 - first))
        return end + (1e-3 - end) * (1 + math.cos(math.pi * share)) / 2

    found = values(warmup_cosine(1e-3, 20, warmup, end), 25)
    np.testing.assert_allclose(found, [formula(t) for t in range(25)], rtol=1e-5, atol=1e-9)


def test_it_is_the_schedule_of_optax():
    ours = warmup_cosine(3e-4, 100, 0.03, 1e-5)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 3, 100, 1e-5)
    np.testing.assert_array_equal(values(ours, 110), values(theirs, 110))


def test_the_peak_is_reached_and_the_end_too():
    found = values(warmup_cosine(1e-3, 50, 10.0), 51)
    assert found.argmax() == 10
    assert found[10] == pytest.approx(1e-3)
    assert found[50] == pytest.approx(0, abs=1e-10)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    expected = [0, 25e-5, 5e-4, 75e-5, 1e-3, 1e-3]
    np.testing.assert_allclose(values(warmup_cosine(1e-3, 4, 4.0), 6), expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_finite_rates(steps):
    assert np.isfinite(values(warmup_cosine(1e-3, steps, 0.03), 5)).all()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((-1e-3, 20), "learning_rate=-0.001 is negative"),
        ((1e-3, 20, 21.0), "warmup=21.0 is not within the run's 20 steps"),
        ((1e-3, 20, -1.0), "warmup=-1.0 is not within the run's 20 steps"),
        ((1e-3, 20, -0.5), "warmup=-0.5 is not within the run's 20 steps"),
    ],
)
def test_settings_that_make_no_schedule_are_named(args, sentence):
    with pytest.raises(ValueError, match=sentence):
        warmup_cosine(*args)

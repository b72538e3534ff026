import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax import train, types
from trainjax.optim import norm_test


def linear(inputs, params, batch, key):
    """Its gradient is the weighted mean of the rows' `c`."""
    return jnp.sum(batch["weights"][:, None] * batch["c"] * params["x"]), {}


@pytest.mark.parametrize("parts", [2, 4])
def test_the_noise_is_the_variance_of_the_mean_over_its_square(parts):
    c = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) + 1
    batch = {"weights": np.full(8, 1 / 8, np.float32), "c": c}
    step = train.make_step(helpers.keep_gradients, accumulate=parts, gradient=norm_test.measured)
    state = train.init({"x": jnp.ones(3)}, helpers.keep_gradients)
    state, metrics = step(state, types.Loss(linear, ()), batch)
    each = np.stack([c[part::parts].mean(0) for part in range(parts)]).astype(np.float64)
    mean = each.mean(0)
    variance = ((each - mean) ** 2).sum() / (parts - 1) / parts
    assert float(metrics["gradient_noise"]) == pytest.approx(variance / (mean @ mean), rel=1e-4)
    np.testing.assert_allclose(state.opt_state["x"], mean, rtol=1e-5)


def test_equal_micro_batches_have_no_noise():
    batch = {"weights": np.full(4, 0.25, np.float32), "c": np.ones((4, 3), np.float32)}
    step = train.make_step(helpers.keep_gradients, accumulate=4, gradient=norm_test.measured)
    state = train.init({"x": jnp.ones(3)}, helpers.keep_gradients)
    assert float(step(state, types.Loss(linear, ()), batch)[1]["gradient_noise"]) < 1e-6


@pytest.mark.parametrize(
    ("noise", "expected"), [(0.0, 16), (0.9, 16), (1.1, 20), (3.0, 48), (100.0, 64)]
)
def test_the_batch_grows_with_the_noise_up_to_the_most(noise, expected):
    assert norm_test.batch_size(16, noise, most=64, multiple=4) == expected


def test_less_noise_allowed_asks_for_more_rows():
    assert norm_test.batch_size(16, 0.5, theta=0.5, most=64) == 32


@pytest.mark.parametrize(
    ("args", "settings", "sentence"),
    [
        ((16, 1.0), {"theta": 0.0, "most": 32}, "theta=0.0"),
        ((16, float("nan")), {"most": 32}, "gradient_noise=nan"),
        ((16, 1.0), {"most": 8}, "most=8 rows is less than the current 16"),
    ],
)
def test_what_makes_no_sense_is_named(args, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        norm_test.batch_size(*args, **settings)

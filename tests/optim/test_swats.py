import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax import optim

RATES = np.asarray([1.0, 3.0])
START = np.asarray([1.0, -2.0])


def run(tx, steps):
    params = {"x": jnp.asarray(START, jnp.float32)}
    state, path, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update({"x": jnp.asarray(RATES, jnp.float32) * params["x"]}, state, params)
        params = {"x": params["x"] + updates["x"]}
        path.append(np.asarray(params["x"], np.float64))
    return np.asarray(path), state[0]


def in_numpy(steps, rate, tolerance, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 of the paper in float64, with the tolerance relative to gamma."""
    theta, path, switched = START.copy(), [], None
    m, v, lam, u, sgd = np.zeros(2), np.zeros(2), 0.0, np.zeros(2), None
    for k in range(1, steps + 1):
        g = RATES * theta
        if sgd is not None:
            u = b1 * u + g
            theta = theta - (1 - b1) * sgd * u
        else:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            p = -rate * m / (1 - b1**k) / (np.sqrt(v / (1 - b2**k)) + eps)
            theta = theta + p
            gamma = (p @ p) / -(p @ g)
            lam = b2 * lam + (1 - b2) * gamma
            mean = lam / (1 - b2**k)
            if k > 1 and abs(mean - gamma) < tolerance * abs(gamma) and mean > 0:
                sgd, switched = mean, k
        path.append(theta)
    return np.asarray(path), switched


@pytest.mark.parametrize("tolerance", [0.05, 1e-9])
def test_it_is_the_papers_algorithm(tolerance):
    expected, switched = in_numpy(80, 0.02, tolerance)
    found, state = run(optim.swats(0.02, tolerance=tolerance), 80)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
    assert bool(state.is_sgd) == (switched is not None) == (tolerance == 0.05)
    assert float(state.metrics["is_sgd"]) == (switched is not None)


def test_after_the_switch_the_schedule_goes_on():
    """A learning rate of 0 after step 60 stops SGD too."""
    found, state = run(optim.swats(lambda t: jnp.where(t < 60, 0.02, 0.0), tolerance=0.05), 80)
    assert bool(state.is_sgd)
    assert np.ptp(found[60:], axis=0).max() == 0
    assert np.ptp(found[40:60], axis=0).max() > 0

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import optim

PARAMS = {"layers": {"up": jnp.ones((2, 5, 8)), "down": jnp.ones((2, 8, 5))}, "norm": jnp.ones(5)}


def gradients(count):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape) * (1 + rng.random()), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, PARAMS) for _ in range(count)]


def steps(tx, grads):
    state, found, update = tx.init(PARAMS), [], jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, PARAMS)
        found.append(updates)
    return found, state


def test_at_full_rank_it_is_adam():
    """A matrix whose shorter side is no longer than the rank is not projected."""
    found, _ = steps(optim.fira(1e-2, rank=5), gradients(6))
    expected, _ = steps(optax.adam(1e-2), gradients(6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def in_numpy(grads, rank, every, scale, growth, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 of the paper in float64, of one matrix whose first side is the shorter."""
    m = v = norm = basis = None
    found = []
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        if (t - 1) % every == 0:
            basis = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
        inside = basis.T @ g
        m = (1 - b1) * inside if m is None else b1 * m + (1 - b1) * inside
        v = (1 - b2) * inside**2 if v is None else b2 * v + (1 - b2) * inside**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        factor = np.linalg.norm(step, axis=0) / np.linalg.norm(inside, axis=0)
        outside = factor * (g - basis @ inside)
        size = np.linalg.norm(outside)
        if norm is not None and size > growth * norm:
            outside, size = outside * growth * norm / size, growth * norm
        norm = size
        found.append(scale * (basis @ step + outside))
    return np.asarray(found)


@pytest.mark.parametrize(("every", "growth"), [(1, 1.01), (1000, 1.01), (1000, 10.0)])
def test_it_is_the_papers_algorithm_for_each_layer_and_either_side(every, growth):
    """Signs of the basis do not matter while it stays, and moments are of the basis they were made in:
    so with `every` 1 they must not be averaged, and b1 = b2 = 0 there."""
    averages = {"b1": 0.0, "b2": 0.0} if every == 1 else {}
    grads = gradients(5)
    tx = optim.scale_by_fira(2, every=every, scale=0.25, growth=growth, **averages)
    found, state = steps(tx, grads)
    for layer in range(2):
        for name, turn in [("up", lambda x: x), ("down", np.transpose)]:
            one = [turn(np.asarray(g["layers"][name][layer])) for g in grads]
            expected = in_numpy(one, 2, every, 0.25, growth, **averages)
            ours = [turn(np.asarray(f["layers"][name][layer])) for f in found]
            np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-4)
    assert state.of["layers"]["up"].mu.shape == (2, 2, 8)
    assert state.of["layers"]["down"].mu.shape == (2, 8, 2)


def test_the_subspace_is_found_anew_at_its_steps_alone():
    tx = optim.scale_by_fira(2, every=3)
    state, bases, update = tx.init(PARAMS), [], jax.jit(tx.update)
    for g in gradients(7):
        _, state = update(g, state, PARAMS)
        bases.append(np.asarray(state.of["layers"]["up"].basis))
    changed = [not np.array_equal(a, b) for a, b in zip(bases[1:], bases[:-1], strict=True)]
    assert changed == [False, False, True, False, False, True]
    np.testing.assert_allclose(np.swapaxes(bases[0], 1, 2) @ bases[0], [np.eye(2)] * 2, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank=0 is at least 1"),
        ({"every": 0}, "every=0 is at least 1"),
        ({"growth": 1.0}, "growth=1.0, the largest ratio"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        optim.fira(1e-3, **settings)

"""Half fine-tuning: exactly half of the matrices, by seed, and no update reaches them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import helpers
from trainjax import tree
from trainjax.optim import half_fine_tuning
from trainjax.train import init, make_step
from trainjax.types import Loss


@functools.cache
def choice(seed: int) -> dict[str, np.ndarray]:
    """Which matrices train, `[layers]` for each name."""
    trains = half_fine_tuning(seed).init(helpers.tiny().params).trains
    named = tree.flatten(jax.device_get(trains))
    return {name: np.ravel(leaf) for name, leaf in named.items() if np.ndim(leaf)}


@pytest.mark.parametrize("seed", range(4))
def test_exactly_half_of_the_matrices_of_each_kind_train(seed):
    """Two layers of four and of three matrices: 4 of 8 and 3 of 6 train."""
    found = choice(seed)
    for kind, matrices in (("attention", 8), ("mlp", 6)):
        which = np.concatenate([leaf for name, leaf in found.items() if kind in name])
        assert (which.size, which.sum()) == (matrices, matrices / 2)


def test_each_layer_has_its_half():
    found = choice(0)
    attention = np.stack([leaf for name, leaf in found.items() if "attention" in name])
    mlp = np.stack([leaf for name, leaf in found.items() if "mlp" in name])
    assert attention.sum(axis=0).tolist() == [2, 2]
    assert sorted(mlp.sum(axis=0).tolist()) == [1, 2]


def test_the_choice_is_of_the_seed():
    def bits(seed):
        return np.concatenate(list(choice(seed).values())).tolist()

    first = bits(0)
    choice.cache_clear()
    assert bits(0) == first
    assert len({tuple(bits(seed)) for seed in range(20)}) > 15


def test_over_the_stages_every_matrix_trains_half_the_time():
    """200 stages, four standard errors of a fair coin."""
    share = np.mean([np.concatenate(list(choice(seed).values())) for seed in range(200)], axis=0)
    assert np.abs(share - 0.5).max() < 4 * 0.5 / np.sqrt(200)


def norm(inputs, params, batch, key):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), {}


def test_frozen_matrices_do_not_move_and_all_else_does():
    """Weight decay comes before it in the chain, so it does not reach them either."""
    params = helpers.tiny().params
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), half_fine_tuning(3))
    state, _ = make_step(tx)(init(params, tx), Loss(norm), {"x": np.zeros(1)})
    trains = tree.flatten(optax.tree.get(state.opt_state, "trains"))
    after = jax.tree.leaves(state.params)
    for (name, old), new in zip(tree.flatten(params).items(), after, strict=True):
        moved = np.asarray(old != new)
        np.testing.assert_array_equal(moved, np.broadcast_to(trains[name], moved.shape), name)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no parameter's name matches 'nothing'"):
        half_fine_tuning(0, "nothing").init(helpers.tiny().params)

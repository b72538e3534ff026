import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax.optim import population

KEY = jax.random.key(0)
SCORES = jnp.asarray([0.1, 0.9, 0.5, jnp.nan, 0.8, 0.3, 0.6, 0.2])


def test_the_worst_go_on_as_copies_of_the_best_and_the_others_as_themselves():
    for n in range(20):
        chosen = np.asarray(population.parents(jax.random.key(n), SCORES))
        assert chosen[[1, 2, 4, 5, 6, 7]].tolist() == [1, 2, 4, 5, 6, 7]
        assert set(chosen[[0, 3]]) <= {1, 4}


def test_only_those_who_were_replaced_explore():
    chosen = population.parents(KEY, SCORES)
    rates = {"learning_rate": jnp.arange(1.0, 9.0)}
    found = np.asarray(population.explored(KEY, rates, chosen)["learning_rate"])
    for member, parent in enumerate(np.asarray(chosen)):
        ratio = found[member] / (parent + 1)
        near = [1.0] if member == parent else [0.8, 1.25]
        assert min(abs(ratio - factor) for factor in near) < 1e-6


def test_a_population_finds_a_learning_rate_that_its_members_did_not_begin_with():
    """A parabola: rates begin too small by far; after rounds the best member is at the bottom."""
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)
    params = {"x": jnp.full((8, 2), 5.0)}
    state = jax.vmap(tx.init)(params)
    state = state._replace(hyperparams={"learning_rate": jnp.geomspace(1e-4, 1e-2, 8)})
    value = lambda p: jnp.sum(p["x"] ** 2)  # noqa: E731

    @jax.jit
    @jax.vmap
    def train(params, state):
        def one(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(value)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, state), length=5)[0]

    evolve = jax.jit(population.evolved)
    alone, other = params, state
    for number in range(30):
        params, state = train(params, state)
        alone, other = train(alone, other)
        scores = -jax.vmap(value)(params)
        params, state, _ = evolve(jax.random.fold_in(KEY, number), params, state, scores)
    best = float(jax.vmap(value)(params).min())
    assert best < 0.1 * float(jax.vmap(value)(alone).min())
    assert float(state.hyperparams["learning_rate"].max()) > 2e-2


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (0.0, "share=0.0 of the population"),
        (0.6, "share=0.6"),
        (0.01, "share=0.01 of 8 members is nobody"),
    ],
)
def test_shares_that_make_no_sense_are_named(share, sentence):
    with pytest.raises(ValueError, match=sentence):
        population.parents(KEY, SCORES, share)


def test_an_optimizer_without_injected_hyperparameters_is_refused():
    state = jax.vmap(optax.sgd(1.0).init)({"x": jnp.ones((8, 2))})
    with pytest.raises(ValueError, match=r"optax.inject_hyperparams\(...\)"):
        population.evolved(KEY, {}, state, SCORES)

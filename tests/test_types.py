"""Contracts: what a pytree dataclass and a `Loss` promise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax.types import Loss, pytree, static


@pytree
class Pair:
    """Two children around a static field."""

    first: Any
    name: str = static()
    second: Any = 2.0


def test_fields_are_children_and_static_ones_are_part_of_the_type():
    pair = Pair(jnp.ones(3), "x")
    children, structure = jax.tree.flatten(pair)
    assert len(children) == 2
    again = jax.tree.unflatten(structure, children)
    assert (again.first is pair.first, again.name, again.second) == (True, "x", 2.0)
    assert structure == jax.tree.structure(Pair(jnp.zeros(3), "x"))
    assert structure != jax.tree.structure(Pair(jnp.ones(3), "y"))
    assert hash(structure) == hash(jax.tree.structure(Pair(0, "x", 0)))


def test_leaves_are_named_by_their_field():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(Pair(1, "x"))]
    assert paths == [".first", ".second"]


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pair(1, "x").first = 2


def test_jit_sees_a_new_program_in_a_static_field_only():
    traces = []

    @jax.jit
    def double(pair):
        traces.append(pair.name)
        return Pair(2 * pair.first, pair.name)

    for first, name in ((1.0, "x"), (2.0, "x"), (2.0, "y")):
        assert double(Pair(jnp.float32(first), name)) == Pair(2 * first, name)
    assert traces == ["x", "y"]


def test_it_is_rebuilt_around_anything_that_jax_puts_in():
    """Placeholders have no shape, so the constructor's types must not see them."""
    assert jax.tree.map(lambda _: None, Pair(1, "x")) == Pair(None, "x", None)


# --- losses -------------------------------------------------------------------------------------


def power(inputs, params, batch, key):
    """`sum(coefficient * params^exponent)`, with a draw of the key as a metric."""
    coefficient, exponent = inputs
    draw = jnp.float32(-1.0) if key is None else jax.random.uniform(key)
    return coefficient * params**exponent, {"draw": draw}


def loss(coefficient: float, exponent: float) -> Loss:
    return Loss(power, (jnp.float32(coefficient), jnp.float32(exponent)))


X = jnp.float32(3.0)


def test_sum_and_scale_are_of_values_and_gradients():
    """`2 x^2 + 0.5 * 4 x^3` at 3: 18 + 54, and 12 + 54 for the derivative."""
    both = loss(2, 2).named("a") + 0.5 * loss(4, 3).named("b")
    (value, metrics), slope = jax.value_and_grad(both, has_aux=True)(X, {})
    assert (float(value), float(slope)) == pytest.approx((72, 66))
    assert metrics.keys() == {"a/draw", "b/draw"}


@pytest.mark.parametrize(
    "weight", [3, 3.0, np.float32(3), jnp.float32(3)], ids=lambda w: type(w).__name__
)
def test_any_number_scales_from_either_side(weight):
    for scaled in (weight * loss(1, 1), loss(1, 1) * weight):
        assert isinstance(scaled, Loss)
        assert float(scaled(X, {})[0]) == 9.0


def test_terms_of_a_sum_draw_alike_and_without_a_key_neither_draws():
    both = loss(1, 1).named("a") + loss(1, 1).named("b")
    drawn = both(X, {}, jax.random.key(0))[1]
    assert drawn["a/draw"] == drawn["b/draw"] >= 0.0
    assert set(map(float, both(X, {})[1].values())) == {-1.0}


def test_metrics_of_one_name_are_refused_until_they_are_named():
    with pytest.raises(ValueError, match=r"metrics \['draw'\].*loss.named"):
        (loss(1, 1) + loss(1, 2))(X, {})
    assert (loss(1, 1) + loss(1, 2).named("b"))(X, {})[1].keys() == {"draw", "b/draw"}


def test_names_nest():
    assert loss(1, 1).named("a").named("b")(X, {})[1].keys() == {"b/a/draw"}


@pytest.mark.parametrize("f", [lambda a: a + 1.0, lambda a: a * a, lambda a: 1.0 + a])
def test_a_loss_adds_to_losses_and_multiplies_by_numbers_only(f):
    with pytest.raises(TypeError):
        f(loss(1, 1))


def test_losses_that_differ_in_numbers_are_one_program():
    traces = []

    @jax.jit
    def value(loss, x):
        traces.append(1)
        return loss(x, {})[0]

    found = [float(value(c * loss(c, 2).named("a") + loss(1, 1), X)) for c in (1.0, 2.0)]
    assert found == [12.0, 39.0]
    assert len(traces) == 1
    assert float(value(loss(1, 1), X)) == 3.0  # another composition is another program
    assert len(traces) == 2


def test_python_sums_a_list_of_losses():
    terms = [loss(1, 1), loss(2, 1).named("a"), loss(3, 1).named("b")]
    np.testing.assert_allclose(sum(terms)(X, {})[0], (terms[0] + terms[1] + terms[2])(X, {})[0])


def test_a_loss_given_to_jit_as_the_function_says_how_to_give_it():
    with pytest.raises(TypeError, match="a Loss is a pytree of arrays.* give it .* as an argument"):
        jax.jit(loss(1, 1))(X, {})

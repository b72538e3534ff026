"""Tokens drawn in blocks of the vocabulary are drawn from the softmax of all the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.ops.draw import draw
from trainjax.ops.head import Tied
from trainjax.peft.lora import Lora

VOCAB, EMBED = 13, 4


def heads() -> dict[str, object]:
    matrix = np.random.default_rng(0).standard_normal((EMBED, VOCAB)).astype(np.float32)
    zeros = jnp.zeros((EMBED, 1)), jnp.zeros((1, VOCAB)), jnp.ones(())
    return {
        "matrix": jnp.asarray(matrix),
        "tied": Tied(jnp.asarray(matrix.T)),
        "weight": Lora(jnp.asarray(matrix), *zeros),
    }


@pytest.mark.parametrize("block", [5, 13, None])
@pytest.mark.parametrize("name", ["matrix", "tied", "weight"])
def test_frequencies_are_the_softmax_of_the_logits(name, block):
    """Pearson's chi-square of 20000 draws of one state; 12 degrees of freedom, 99.9% at 32.9.

    Blocks of 5 do not divide the vocabulary: the last has 3.
    """
    state = np.random.default_rng(1).standard_normal(EMBED).astype(np.float32)
    hidden = jnp.asarray(np.tile(state, (100, 200, 1)))
    found = jax.jit(draw, static_argnames="vocab_block")(
        jax.random.key(0), hidden, heads()[name], vocab_block=block
    )
    assert found.dtype == jnp.int32
    logits = state.astype(np.float64) @ np.asarray(heads()["matrix"], np.float64)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    counts = np.bincount(np.ravel(found), minlength=VOCAB)
    assert len(counts) == VOCAB
    assert np.sum((counts - 20000 * p) ** 2 / (20000 * p)) < 32.9


def test_each_state_has_its_own_draw_from_its_own_distribution():
    """States that each make another token certain."""
    head = jnp.eye(VOCAB)
    wanted = np.random.default_rng(0).integers(0, VOCAB, (3, 5)).astype(np.int32)
    hidden = 1e4 * jax.nn.one_hot(wanted, VOCAB)
    np.testing.assert_array_equal(draw(jax.random.key(0), hidden, head, vocab_block=4), wanted)


def test_nobody_makes_all_the_logits():
    hidden, head = jnp.ones((2, 3, EMBED)), jnp.ones((EMBED, VOCAB))
    program = jax.make_jaxpr(lambda h: draw(jax.random.key(0), h, head, vocab_block=5))(hidden)
    shapes = helpers.shapes_in(program.jaxpr)
    assert (6, 5) in shapes
    assert not [shape for shape in shapes if VOCAB in shape and len(shape) > 1]

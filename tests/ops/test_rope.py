"""Rotary positions: the definition, relative distance, and transformers' own scaled frequencies."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax.models.llama import rope
from trainjax.ops.rope import Rope, rotate, rotation

GOLDEN = json.loads((helpers.GOLDEN / "rope_frequencies.json").read_text())


def positions(*shape: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)


def test_pairs_turn_by_their_angle():
    """`(x[i], x[i + d/2])` as a complex number, times `exp(i p theta^(-2i/d))`."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    turned = rotate(jnp.asarray(x), rotation(Rope(100.0), positions(2, 5), 8))
    angle = np.arange(5)[:, None] * 100.0 ** (-2 * np.arange(4) / 8)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None, :]
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), rtol=0, atol=1e-5)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(query_at: int, key_at: int) -> float:
        tables = (rotation(Rope(), jnp.asarray([[at]], jnp.int32), 16) for at in (query_at, key_at))
        return float(jnp.sum(rotate(q, next(tables)) * rotate(k, next(tables))))

    np.testing.assert_allclose(product(9, 4), product(105, 100), rtol=1e-4)


def test_position_zero_is_the_identity():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 2, 8)), jnp.float32)
    np.testing.assert_array_equal(rotate(x, rotation(Rope(), positions(1, 1), 8)), x)


def test_angles_of_bf16_states_are_float32():
    """At position 30000 a bf16 angle would be off by up to 64 radians."""
    tables = rotation(Rope(), jnp.asarray([[30000]], jnp.int32), 4)
    np.testing.assert_allclose(tables.cos[0, 0, 0], np.cos(30000.0), atol=1e-5)
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert rotate(x, tables).dtype == jnp.bfloat16


def test_linear_scaling_divides_every_frequency():
    np.testing.assert_array_equal(Rope(factor=4.0).frequencies(8), Rope().frequencies(8) / 4)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_frequencies_are_those_of_transformers(name):
    case = GOLDEN["cases"][name]
    found = rope(case["config"]).frequencies(case["head_dim"])
    np.testing.assert_allclose(found, case["inv_freq"], rtol=1e-6)

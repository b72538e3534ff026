"""The low-rank product's own gradient is that of autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax.ops.low_rank import low_rank


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "fan_in", "rank", "fan_out"), [(6, 5, 2, 7), (1, 3, 1, 3)])
def test_product_and_gradients_are_those_of_two_products(rows, fan_in, rank, fan_out, dtype):
    rng = np.random.default_rng(0)
    shapes = (rows, fan_in), (fan_in, rank), (rank, fan_out), (rows, fan_out)
    *args, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    out, pull = jax.vjp(low_rank, *args)
    expected, expected_pull = jax.vjp(lambda x, a, b: (x @ a) @ b, *args)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    for found, wanted in zip((out, *pull(g)), (expected, *expected_pull(g)), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), 0, tolerance
        )

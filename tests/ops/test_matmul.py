"""Products with gradients of their own: they are those of autodiff, and no operand is widened."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax.ops.matmul import low_rank, matmul


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(f, *args):
    *args, g = args
    out, pull = jax.vjp(f, *args)
    return out, *pull(g)


def with_gradients(f, *args):
    return jax.device_get(_with_gradients(f, *args))


def check(f, plain, shapes, dtypes):
    """`f` and its gradients are those of `plain` in float32, up to the rounding of the dtypes."""
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
    found = with_gradients(f, *args)
    wanted = with_gradients(plain, *(x.astype(np.float32) for x in args))
    tolerance = 1e-5 if all(dtype == jnp.float32 for dtype in dtypes) else 0.03
    for one, right, dtype in zip(found, wanted, (dtypes[0], *dtypes[:-1]), strict=True):
        assert one.dtype == dtype
        scale = np.abs(right).max()
        np.testing.assert_allclose(one.astype(np.float32), right, 0, tolerance * scale)


F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16,) * 3, (BF16, F32, BF16), (F32, BF16, F32)])
def test_product_and_its_gradients_are_those_of_autodiff_each_in_its_own_dtype(dtypes):
    check(matmul, lambda x, w: x @ w, [(6, 5), (5, 7), (6, 7)], dtypes)


IN_A_LOOP = """
import jax, jax.numpy as jnp
from trainjax import platform
from trainjax.ops.matmul import matmul

def loss(x, w):
    return jax.lax.scan(lambda x, w: (matmul(x, w), None), x, w)[0].astype(jnp.float32).var()

x, w = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((3, 32, 32), jnp.bfloat16)
options = platform.compiler_options()
print(jax.jit(jax.grad(loss), compiler_options=options).lower(x, w).compile().as_text())
"""


def test_on_cpu_products_of_bf16_are_summed_in_float32_and_nothing_is_widened_first():
    """In a loop over stacked weights: neither an operand nor the stack is held in float32.

    In a process of its own, which compiles as a user's does.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", IN_A_LOOP]
    program = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    products = [line for line in program.splitlines() if " dot(" in line]
    assert len(products) == 2
    assert all("f32[64,32]" in line for line in products)
    assert "f32[3,32,32]" not in program
    assert "f32[32,32]" not in program


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "fan_in", "rank", "fan_out"), [(6, 5, 2, 7), (1, 3, 1, 3)])
def test_product_and_gradients_are_those_of_two_products(rows, fan_in, rank, fan_out, dtype):
    shapes = (rows, fan_in), (fan_in, rank), (rank, fan_out), (rows, fan_out)
    check(low_rank, lambda x, a, b: (x @ a) @ b, shapes, (dtype,) * 4)

"""Rollouts at random, the goldens of policy gradients, and how a formula is compared with them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests import helpers

TRL = json.loads((helpers.GOLDEN / "policy_gradient_trl.json").read_text())
VERL = json.loads((helpers.GOLDEN / "policy_gradient_verl.json").read_text())
SEEDS = range(200)


def arrays(data: dict[str, Any], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype) for name, value in data.items()}


def random_tokens(seed: int, batch: int = 3, seq: int = 8) -> dict[str, np.ndarray]:
    """Numbers of a rollout in float64, and a mask with gaps; the first row has no action at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, seq)) < 0.6
    mask[0], mask[1, 2] = False, True
    old = -rng.gamma(2.0, 0.8, (batch, seq))
    names = ("rewards", "values", "advantages", "returns")
    return {
        "mask": mask,
        "old_logprobs": old,
        "logprobs": old + 0.5 * rng.standard_normal((batch, seq)),
        "terminal_values": rng.standard_normal(batch),
        **{name: rng.standard_normal((batch, seq)) for name in names},
    }


def in_both_precisions(f: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """`f` jitted in float32 and in float64."""
    jitted = jax.jit(f)
    narrow = [np.float32(a) if np.asarray(a).dtype == np.float64 else a for a in args]
    return jax.device_get(jitted(*narrow)), helpers.in_float64(jitted, *args)


def assert_both(f: Callable[..., Any], args: Any, expected: Any) -> None:
    """`f` is the expected array to 1e-5 in float32 and to 1e-6 (in fact far closer) in float64."""
    single, double = in_both_precisions(f, *args)
    np.testing.assert_allclose(double, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


def assert_gradient(f: Callable[[Any], Any], x: np.ndarray, step: float = 1e-6) -> None:
    """The gradient of a scalar function is that of central differences, in float64."""
    gradient = helpers.in_float64(jax.jit(jax.grad(f)), x)
    value = functools.partial(helpers.in_float64, jax.jit(f))
    numeric = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[at] = step
        numeric[at] = (value(x + moved) - value(x - moved)) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)

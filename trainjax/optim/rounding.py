"""Stochastic rounding: params in bfloat16 that small updates reach, on average."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from trainjax import tree
from trainjax.types import Params


class RoundingState(NamedTuple):
    """The optimizer's state, of float32, and the number of steps, which the rounding draws from.

    Attributes:
        step: steps done.
        inner: the optimizer's.
    """

    step: Int[Array, ""]
    inner: Any


def round_stochastically(x: Array, key: PRNGKeyArray) -> Array:
    """Float32 to bfloat16: up or down to a neighbour, so that the expectation is x.

    The 16 bits that bfloat16 lacks are a fraction of the way from one neighbour to the next; a random
    number of 16 bits is added, and what it carries stays. Infinities and NaNs stay what they are.

    Args:
        x: float32.
        key: one a call.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), up, bits), jnp.float32)
    return rounded.astype(jnp.bfloat16)


def with_stochastic_rounding(
    tx: optax.GradientTransformation, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of params in bfloat16, without float32 copies of them.

    It computes in float32, moments included, and rounds `theta + update` stochastically. Rounded to the
    nearest an update of less than 1/512 of its parameter would be lost, every time; so it takes effect
    as often as it should. Half the memory of float32 masters, and as much noise as the rounding makes.
    Params of other dtypes are updated as ever. Around the whole chain.

    Args:
        tx: the optimizer.
        seed: of the noise, which also depends on the step and the parameter's name.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3; Zamirai et al. 2020, arXiv:2010.06192, for
    updates.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> RoundingState:
        return RoundingState(jnp.zeros((), jnp.int32), tx.init(tree.cast(params, jnp.float32)))

    def update(
        updates: Params, state: RoundingState, params: Any = None, **extra: Any
    ) -> tuple[Params, RoundingState]:
        if params is None:
            raise ValueError("rounding needs the params: tx.update(grads, state, params)")
        wide = tree.cast(params, jnp.float32)
        grads = tree.cast(updates, jnp.float32)
        new, inner = tx.update(grads, state.inner, wide, **extra)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def leaf(name: str, step: Array, old: Array, at: Array) -> Array:
            if old.dtype != jnp.bfloat16:
                return step.astype(old.dtype)
            # Of neighbours of one binade the difference is exact in float32, so that adding it gives the
            # rounded number itself.
            rounded = round_stochastically(at + step, tree.key_for(key, name))
            return rounded.astype(jnp.float32) - at

        steps = tree.map_named(leaf, new, params, wide)
        return steps, RoundingState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)

"""How far each layer has turned from where it began: a monitor that changes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from trainjax import tree
from trainjax.types import Metrics, Params


class RotationState(NamedTuple):
    """Where the layers began, and how far they are.

    Attributes:
        start: the watched parameters by name, as they were.
        metrics: `rotation/NAME` and, over all, `rotation` (the mean), all in [0, 2].
    """

    start: dict[str, Array]
    metrics: Metrics


def watch_rotation(target: str = r"kernel") -> optax.GradientTransformation:
    """`1 - cos(w, w_0)` of each matrix, the mean over the layers of a stack, as metrics. Last in a chain.

    At equal training loss networks whose layers all turned far (towards 1) tend to generalise better, and a
    layer that hardly turns learns little. A layer that began at 0, as LoRA's second factor, has no angle
    and counts 0 until it moves, 1 afterwards. Keeps a copy of what it watches.

    Args:
        target: regex of the parameters.

    Raises:
        ValueError: at `init`: a regex that matches nothing.

    Source: Carbonnelle and De Vleeschouwer 2018, arXiv:1806.01603, equation 1.
    """

    def init(params: Params) -> RotationState:
        start = {name: jnp.copy(leaf) for name, leaf in tree.select(params, target).items()}
        return RotationState(start, _told(start, start))

    def update(updates: Params, state: RotationState, params: Any = None) -> Any:
        if params is None:
            raise ValueError("watch_rotation needs the params: tx.update(grads, state, params)")
        new = tree.flatten(optax.apply_updates(params, updates))
        return updates, RotationState(state.start, _told(state.start, new))

    return optax.GradientTransformation(init, update)


def _told(start: dict[str, Array], now: dict[str, Array]) -> Metrics:
    each = {name: _rotation(name, old, now[name]) for name, old in start.items()}
    rows = jnp.concatenate([jnp.ravel(rotation) for rotation in each.values()])
    means = {f"rotation/{name}": jnp.mean(rotation) for name, rotation in each.items()}
    return means | {"rotation": jnp.mean(rows)}


def _rotation(name: str, old: Array, new: Array) -> Float[Array, "*layers"]:
    """Rotation of each layer of a stack, or of one matrix."""
    axes = tuple(range(1 if name.split("/")[0] == "layers" else 0, old.ndim))
    old, new = tree.wide(old), tree.wide(new)
    size = jnp.sqrt(jnp.sum(old * old, axes) * jnp.sum(new * new, axes))
    cosine = jnp.sum(old * new, axes) / jnp.where(size > 0, size, 1.0)
    moved = jnp.any(old != new, axes)
    return jnp.where(moved, 1.0 - jnp.where(size > 0, cosine, 0.0), 0.0)

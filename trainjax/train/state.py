"""What one step turns into the next: params, optimizer state, step, random key."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from trainjax import platform, tree
from trainjax.types import Params


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint of it holds.

    Attributes:
        step: optimizer steps done.
        params: what trains: an adapter or the whole model, in float32; parts of it may be `Frozen`.
        opt_state: the optimizer's, of what is not frozen; a `WithCombiner` where a gradient combiner
            has a state too.
        key: root of the run's randomness; step n uses `fold_in(key, n)`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray


class WithCombiner(NamedTuple):
    """An optimizer's state beside that of a gradient combiner.

    In the place of the optimizer's, so that the checkpoints of runs without a combiner are the same
    whether or not this exists.
    """

    optimizer: Any
    combiner: Any


def split_opt_state(opt_state: Any) -> WithCombiner:
    """The optimizer's state, and the combiner's: `()` where it has none."""
    return opt_state if isinstance(opt_state, WithCombiner) else WithCombiner(opt_state, ())


def join_opt_state(optimizer: Any, combiner: Any) -> Any:
    """The inverse of `split_opt_state`."""
    return WithCombiner(optimizer, combiner) if jax.tree.leaves(combiner) else optimizer


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray | int = 0,
    combiner_state: Any = (),
) -> TrainState:
    """The state before the first step.

    Params and key are copied: the step donates its state, and must not take away arrays that a
    caller still holds (an EWC anchor, the initial adapter).

    Args:
        params: what trains.
        tx: the Optax chain that `make_step` gets.
        key: root of the run's randomness, or its seed.
        combiner_state: `combiner.init(losses)`, for a gradient combiner that has a state.
    """
    key = jax.random.key(key) if isinstance(key, int) else jnp.copy(key)
    params = jax.tree.map(jnp.copy, params)
    opt_state = _without_aliases(tx.init(tree.trainable(params)), params)
    opt_state = join_opt_state(opt_state, jax.tree.map(jnp.copy, combiner_state))
    return _committed(TrainState(jnp.zeros((), jnp.int32), params, opt_state, key))


def _without_aliases(opt_state: Any, params: Params) -> Any:
    """Copies of what an optimizer took over from the params or has twice; no buffer may be donated twice."""
    taken = {id(leaf) for leaf in jax.tree.leaves(params)}
    leaves, structure = jax.tree.flatten(opt_state)
    for place, leaf in enumerate(leaves):
        if id(leaf) in taken:
            leaves[place] = jnp.copy(leaf)
        taken.add(id(leaf))
    return jax.tree.unflatten(structure, leaves)


def _committed(state: TrainState) -> TrainState:
    """Every leaf on the devices of the params, for good.

    One jitted step takes one set of devices, so scalars and keys go where the params are. And the
    step returns arrays that are bound to their devices: were those of the first state free to move,
    the second call would be a second program.
    """
    layouts = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    mesh = next((layout.mesh for layout in layouts if isinstance(layout, NamedSharding)), None)
    if mesh is None:
        # An offloaded state stays in the memory that it is in.
        return jax.tree.map(
            lambda x: jax.device_put(x, layouts[0].with_memory_kind(x.sharding.memory_kind)), state
        )
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Array) -> Array:
        return leaf if isinstance(leaf.sharding, NamedSharding) else platform.put(leaf, everywhere)

    return jax.tree.map(place, state)

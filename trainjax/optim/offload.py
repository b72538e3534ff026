"""An optimizer whose state waits in the host's memory between steps."""

from __future__ import annotations

from typing import Any

import jax
import optax

from trainjax.types import Params


def offloaded(
    tx: optax.GradientTransformation, *, at_least: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, with its arrays in pinned host memory while the loss is computed.

    The step fetches them for the update and sends the new ones back: the device holds the moments only
        then, at the
    price of moving them twice a step. The compiler can overlap the transfers with the backward pass.
    Checkpoints and layouts over devices are those of the state as ever.

    Args:
        tx: the optimizer.
        at_least: smaller arrays stay on the device.

    Raises:
        ValueError: at `init`, on a platform whose devices have no `pinned_host` memory.

    Source: the idea of Ren et al. 2021, arXiv:2101.06840 (ZeRO-Offload), of the state alone: the update
    itself is the device's.
    """
    tx = optax.with_extra_args_support(tx)

    def is_large(x: Any) -> bool:
        return x.size >= at_least

    def move(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if is_large(x) else x, state)

    def init(params: Params) -> Any:
        kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
        if "pinned_host" not in kinds:
            raise ValueError(
                f"{jax.default_backend()} has the memories {', '.join(kinds)} and no pinned_host, where an "
                "offloaded state would be"
            )
        return move(tx.init(params), jax.memory.Space.Host)

    def update(updates: Params, state: Any, params: Any = None, **extra: Any) -> Any:
        state = move(state, jax.memory.Space.Device)
        updates, state = tx.update(updates, state, params, **extra)
        return updates, move(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)

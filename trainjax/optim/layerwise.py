"""Discriminative learning rates: the deeper below the output a layer is, the smaller its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from trainjax import tree
from trainjax.types import Params


def layerwise_decay(
    decay: float, num_layers: int, *, layers: Mapping[str, Sequence[int] | None] | None = None
) -> optax.GradientTransformation:
    """Scales the updates of layer `i` of `L` by `decay^(L - i)`: last in a chain, after weight decay.

    What comes after the layers (last norm, head) keeps its learning rate, the last layer has `decay`
    times that, and the embeddings, below the first layer, `decay^(L + 1)`. Of full tuning, of adapters with
    parts for all layers (LoRA), and with `layers` of adapters that hold some.

    Args:
        decay: in (0, 1]; `1 / 2.6` in ULMFiT, 0.65 to 0.95 in later work.
        num_layers: of the model.
        layers: by name of a leaf, the layers that the rows of its leading axis are of, where these are
            not all of them: what `peft.trained_layers(target, params)` returns.

    Raises:
        ValueError: decay outside (0, 1]; a leaf under `layers/` with another number of rows.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.2: `eta(l - 1) = eta(l) / 2.6`.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay={decay} is a factor from one layer to the one below, in (0, 1]")

    numbers = layers or {}

    def scaled(name: str, update: Array) -> Array:
        scale = decay ** _depth(name, update.shape, num_layers, numbers.get(name))
        return update * jnp.asarray(scale.reshape(-1, *[1] * (update.ndim - 1)), update.dtype)

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        return tree.map_named(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _depth(
    name: str, shape: Sequence[int], num_layers: int, layers: Sequence[int] | None
) -> np.ndarray:
    """How many layers below the output the rows of a leaf are; one number for a leaf without layers."""
    parts = name.split("/")
    if "layers" not in parts:
        return np.asarray([num_layers + 1.0 if "embed" in parts else 0.0])
    layers = range(num_layers) if layers is None else layers
    if shape[0] != len(layers):
        raise ValueError(
            f"{name} has {shape[0]} layers, and the learning rates are of {len(layers)}; num_layers is the "
            "model's, and layers says which of them an adapter of some has"
        )
    return num_layers - np.asarray(layers, float)

"""Tied-LoRA: one pair of factors for all layers, scaled by two vectors of each layer's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from trainjax.peft import _own_files as own_files
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    checked_dropout,
    drawn,
    dropout_keys,
    merged,
    replaced,
    targets,
)
from trainjax.peft.lora import Lora
from trainjax.types import Params, Peft, PeftFiles

AXES = {"a": ("in", None), "b": (None, "out"), "u": (None,), "v": ("out",)}


@dataclasses.dataclass(frozen=True)
class Tied:
    """The settings; see `tied_lora`."""

    rank: int
    alpha: float
    target: str
    dropout: float


def tied_lora(
    rank: int = 16, alpha: float = 32.0, target: str = ALL_LINEAR, *, dropout: float = 0.0
) -> Peft:
    """`W_l + (alpha / rank) A diag(u_l) B diag(v_l)`: `A` and `B` of all layers, `u` and `v` of each.

    The paper's variant in which all four train. Matrices share factors with those of the same name in
    other layers (all queries, all ups), which have one shape; a matrix outside the layers has its own.
    `A` starts uniform in `±1/sqrt(in)`, `B` at zero, `u` and `v` at one, so the adapter starts as the
    identity. The files are ours: PEFT does not have the method.

    Args:
        rank: inner size of the update.
        alpha: numerator of its scale.
        target: regex over parameter names such as `layers/attention/query/kernel`.
        dropout: on the update's input, in training only.

    Raises:
        ValueError: rank below 1 or above a matrix's sides; dropout outside [0, 1); a regex that
            matches nothing.

    Source: Renduchintala et al. 2023, arXiv:2311.09578, section 2.
    """
    return _method(Tied(rank, float(alpha), target, checked_dropout(dropout)))


@functools.cache
def _method(config: Tied) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: Tied, key: PRNGKeyArray, params: Params) -> Params:
    found = targets(params, config.target)
    for name, w in found.items():
        if not 1 <= config.rank <= min(w.shape[-2:]):
            fan_in, fan_out = w.shape[-2:]
            raise ValueError(
                f"rank={config.rank} for {name}, {fan_in} x {fan_out}: a rank is from 1 to "
                f"{min(fan_in, fan_out)} there"
            )
    return drawn(key, found, functools.partial(_draw, config.rank), AXES)


def _draw(rank: int, key: PRNGKeyArray, name: str, w: Any) -> Parts:
    *stack, fan_in, fan_out = w.shape
    tied = _tied(stack)
    bound = fan_in**-0.5
    return {
        "a": jax.random.uniform(key, (*tied, fan_in, rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((*tied, rank, fan_out), jnp.float32),
        "u": jnp.ones((*stack, rank), jnp.float32),
        "v": jnp.ones((*stack, fan_out), jnp.float32),
    }


def _tied(stack: Sequence[int]) -> tuple[int, ...]:
    """The stack's axes with one layer; experts of a layer are not tied."""
    return (1, *stack[1:]) if stack else ()


def _weight(
    config: Tied, key: PRNGKeyArray | None, name: str, w: Any, parts: Mapping[str, Array]
) -> Lora:
    """Scaled factors for each layer, `[layers, in, rank]`: as much as LoRA's own."""
    stack = w.shape[:-2]
    a = parts["a"] * parts["u"][..., None, :]
    b = parts["b"] * parts["v"][..., None, :]
    scale = jnp.full(stack, config.alpha / config.rank, jnp.float32)
    return Lora(w, a, b, scale, dropout_keys(key, config.dropout, name, stack), config.dropout)


def _attach(
    config: Tied, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    return replaced(params, adapter, functools.partial(_weight, config, key))


def _merge(config: Tied, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        return merged(_weight(config, None, name, w, parts), w)

    return replaced(params, adapter, leaf)


def _export(config: Tied, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("tied_lora", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are not of Tied-LoRA.

    Raises:
        ValueError: a setting that the method does not have, a shape that does not fit, numbers that are
            not finite; each by name.
    """
    return own_files.method_in(files, "tied_lora", Tied, _method, params)

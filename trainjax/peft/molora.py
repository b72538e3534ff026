"""MoLoRA: several LoRA experts at each matrix, and a router that mixes them for each token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from trainjax.ops.matmul import matmul
from trainjax.peft import _own_files as own_files
from trainjax.peft._low_rank import LowRank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    checked_dropout,
    drawn,
    dropout_keys,
    dropped,
    replaced,
)
from trainjax.types import Metrics, Params, Peft, PeftFiles, Weight, pytree, static

_AXES = {"a": ("in", "experts"), "b": ("experts", "out"), "router": ("in", "experts")}
_PROBABILITIES = "molora_probabilities"


@pytree
class MoLora(Weight):
    """`x @ w + sum_e g_e(x) x @ a_e @ b_e * scale` for a router's gates `g`.

    The experts' ranks stand side by side, `[a_1 | a_2 | ...]`, so that all experts are two products as
    wide as the sum of their ranks, with the gates multiplied in between. A token costs
    `2 experts rank (in + out)` FLOPs for that and `2 in experts` for the router. With `top_k` the gates are
    sparse but the products stay dense: it costs the same.

    Attributes:
        w: the frozen matrix, an array or another `Weight`.
        a, b: the factors of all experts.
        router: makes the experts' logits.
        scale: one number for each matrix of the stack.
        key: turns dropout on; one key for each matrix of the stack.
        top_k: how many experts a token has; None for all.
        dropout: probability that an input of the experts (not of `w` and the router) is zeroed.
    """

    w: Any
    a: Float[Array, "*stack in ranks"]
    b: Float[Array, "*stack ranks out"]
    router: Float[Array, "*stack in experts"]
    scale: Float[Array, "*stack"]
    key: Key[Array, "*stack"] | None = None
    top_k: int | None = static(None)
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        gates = _gates(self._probabilities(x), self.top_k) * self.scale
        inner = matmul(dropped(x, self.key, self.dropout), self.a)
        gated = inner.reshape(*gates.shape, -1) * gates[..., None].astype(x.dtype)
        return matmul(x, self.w) + matmul(gated.reshape(inner.shape), self.b)

    def _probabilities(self, x: Float[Array, "rows in"]) -> Float[Array, "rows experts"]:
        """In float32: a router's softmax in bf16 would send near ties anywhere."""
        return jax.nn.softmax(x.astype(jnp.float32) @ self.router, axis=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        raise ValueError(_NO_MERGE)

    def reports(self, x: Float[Array, "rows in"]) -> Mapping[str, Array]:
        return {_PROBABILITIES: self._probabilities(x)}


_NO_MERGE = (
    "molora does not merge: its router mixes the experts anew for each token, which no matrix does; "
    "keep the adapter beside the model"
)


def _gates(
    probabilities: Float[Array, "rows experts"], top_k: int | None
) -> Float[Array, "rows experts"]:
    """The probabilities, those outside of the `top_k` largest set to zero."""
    return probabilities if top_k is None else probabilities * _chosen(probabilities, top_k)


def _chosen(
    probabilities: Float[Array, "*rows experts"], top_k: int
) -> Float[Array, "*rows experts"]:
    """1 for the `top_k` largest of a row, exactly so many even where some are equal."""
    _, places = jax.lax.top_k(probabilities, top_k)
    return jnp.sum(jax.nn.one_hot(places, probabilities.shape[-1]), axis=-2)


@dataclasses.dataclass(frozen=True)
class _Config:
    experts: int
    top_k: int | None
    rank: int
    alpha: float
    target: str
    dropout: float
    balance: float

    def low_rank(self) -> LowRank:
        return LowRank(self.rank, self.alpha, self.target)


def molora(
    rank: int = 4,
    alpha: float = 8.0,
    target: str = ALL_LINEAR,
    *,
    experts: int = 4,
    top_k: int | None = None,
    dropout: float = 0.0,
    balance: float = 0.01,
) -> Peft:
    """`W + (alpha / rank) sum_e g_e(x) A_e B_e` with `g = softmax(x R)` on the matrices that match `target`.

    Each matrix has its own router `R` and experts. `A_e` starts uniform in `±1/sqrt(in)`, `B_e` at zero, so
    the adapter starts as the identity, and `R` normal of deviation 0.02. All of it trains in float32.

    With `top_k` the gates of other experts than the `top_k` most probable are zero; those that stay are
    the softmax's own and are not made to sum to 1 again, so that the router learns from the task's loss
    even where `top_k` is 1 (Switch Transformer, eq. 2).

    The penalty (`losses.adapter_penalty`) keeps the experts busy alike: `balance E sum_e f_e P_e`, where
    `P_e` is the mean probability of expert `e` and `f_e` its load: the share of the tokens' choices that fall
    on it, or without `top_k`, where every token has all experts, `P_e` again. Means are over tokens that are
    no padding, and the penalty is the mean over all routers: `balance` if the experts are in balance,
    `balance E` if one has all tokens. Metrics: `balance`, the penalty without its coefficient; `load/e` of
    each expert in the mean of the routers; `max_load`, the share of a router's busiest expert in the same
    mean.

    Args:
        rank: inner size of each expert.
        alpha: numerator of the scale.
        target: regex over parameter names.
        experts: how many at each matrix.
        top_k: experts that a token has; None for all of them, mixed (soft merging).
        dropout: on the experts' input, in training only.
        balance: coefficient of the penalty; 0 for none.

    Raises:
        ValueError: fewer than 2 experts; top_k outside 1 to experts; a negative balance; rank, dropout
            and target as in `lora`.

    Source: Zadouri et al. 2023, arXiv:2309.05444 (soft merging); the penalty of Fedus et al. 2021,
        arXiv:2101.03961, eq. 4 to 6.
    """
    if experts < 2:
        raise ValueError(f"experts={experts}: a router needs at least 2 to choose from")
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} is outside 1 to experts={experts}; None takes them all")
    if not balance >= 0:
        raise ValueError(f"balance={balance} would reward one busy expert; use 0 or more")
    dropout = checked_dropout(dropout)
    return _method(_Config(experts, top_k, rank, float(alpha), target, dropout, float(balance)))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    penalty = bind(_penalty, config) if config.balance else None
    return Peft(bind(_init, config), bind(_attach, config), _merge, bind(_export, config), penalty)


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    found = config.low_rank().targets(params)
    return drawn(key, found, functools.partial(_drawn, config), _AXES)


def _drawn(config: _Config, key: PRNGKeyArray, name: str, w: Any) -> Parts:
    *stack, fan_in, fan_out = w.shape
    of_a, of_router = jax.random.split(key)
    bound, width = fan_in**-0.5, config.experts * config.rank
    return {
        "a": jax.random.uniform(of_a, (*stack, fan_in, width), jnp.float32, -bound, bound),
        "b": jnp.zeros((*stack, width, fan_out), jnp.float32),
        "router": 0.02 * jax.random.normal(of_router, (*stack, fan_in, config.experts)),
    }


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    def leaf(name: str, w: Any, parts: Parts) -> MoLora:
        stack = w.shape[:-2]
        scale = config.low_rank().scales(name, stack)
        keys = dropout_keys(key, config.dropout, name, stack)
        factors = parts["a"], parts["b"], parts["router"]
        return MoLora(w, *factors, scale, keys, config.top_k, config.dropout)

    return replaced(params, adapter, leaf)


def _merge(params: Params, adapter: Params) -> Params:
    raise ValueError(_NO_MERGE)


def _penalty(
    config: _Config, adapter: Params, reports: Mapping[str, Array], rows: Float[Array, " rows"]
) -> tuple[Array, Metrics]:
    means, loads = [], []  # each [routers, experts]
    for name, probabilities in reports.items():
        if name.endswith(_PROBABILITIES):
            mean = _weighted(probabilities, rows)
            load = mean
            if config.top_k is not None:
                load = _weighted(_chosen(probabilities, config.top_k), rows) / config.top_k
            means.append(mean.reshape(-1, config.experts))
            loads.append(load.reshape(-1, config.experts))
    mean, load = jnp.concatenate(means), jnp.concatenate(loads)
    balance = config.experts * jnp.mean(jnp.sum(load * mean, axis=-1))
    metrics = {"balance": balance, "max_load": jnp.mean(jnp.max(load, axis=-1))}
    each = {f"load/{e}": share for e, share in enumerate(jnp.mean(load, axis=0))}
    return config.balance * balance, metrics | each


def _weighted(
    values: Float[Array, "*stack rows experts"], rows: Float[Array, " rows"]
) -> Float[Array, "*stack experts"]:
    return jnp.einsum("...re,r->...e", values, rows)


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("molora", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of `molora`, or None if they are another method's.

    Raises:
        ValueError: a setting that it does not have, numbers that are not finite, or shapes that are
            not this model's.
    """
    return own_files.method_in(files, "molora", _Config, _method, params)

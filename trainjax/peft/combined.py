"""Several adapters at once, each with a weight: skills that were learned apart, or that train together."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from trainjax import tree
from trainjax.peft import _member_files as member_files
from trainjax.peft import _sum
from trainjax.types import Frozen, Metrics, Params, Peft, PeftFiles


@dataclasses.dataclass(frozen=True)
class _Settings:
    frozen: tuple[str, ...]
    learned: bool


@dataclasses.dataclass(frozen=True)
class _Config:
    members: tuple[tuple[str, Peft], ...]
    weights: tuple[float, ...]
    settings: _Settings


def combined(
    members: Mapping[str, Peft],
    weights: Mapping[str, float] | None = None,
    *,
    frozen: Collection[str] = (),
    learned: bool = False,
) -> Peft:
    """`f + sum_m weight_m (f_m - f)` at each weight: the base and a weighted sum of what members add to it.

    Each member is attached to the base alone, so their order does not matter; this is task arithmetic
    (Ilharco et al. 2023, arXiv:2212.04089) without merging. Where all members of a matrix are LoRA their
    factors stand side by side, which is exact and one product; otherwise a member costs one product with
    the base's matrix more.

    The adapter is `{"members": {name: adapter}, "weights": {name: number}}`. Weights are arrays in it, so
    other weights compile nothing anew; `learned` lets them train with the rest. What is wrapped in `Frozen`
    does not train and has no dropout. To put adapters together that there are already, see `together`.

    Args:
        members: methods by name.
        weights: of each member; 1 where none is given.
        frozen: members that do not train.
        learned: train the weights too.

    Raises:
        ValueError: no members; a name that is not letters, digits, `-` and `_`; a name in weights or
            frozen that is no member's; a member that has an optimizer's link of its own.
    """
    settings = _Settings(tuple(sorted(frozen)), learned)
    _check(members, weights or {}, settings.frozen)
    numbers = tuple(float((weights or {}).get(name, 1.0)) for name in members)
    return _method(_Config(tuple(members.items()), numbers, settings))


def together(
    members: Mapping[str, tuple[Peft, Params]],
    weights: Mapping[str, float] | None = None,
    *,
    frozen: Collection[str] | None = None,
    learned: bool = False,
) -> tuple[Peft, Params]:
    """The method and the adapter that hold adapters there are already.

    Args:
        members: by name a method and its adapter, as `load_adapter` gives them.
        weights: of each member; 1 where none is given.
        frozen: members that do not train; by default all.
        learned: train the weights.

    Raises:
        ValueError: as `combined`.
    """
    frozen = tuple(members) if frozen is None else frozen
    methods = {name: method for name, (method, _) in members.items()}
    method = combined(methods, weights, frozen=frozen, learned=learned)
    adapters = {
        name: Frozen(adapter) if name in frozen else adapter
        for name, (_, adapter) in members.items()
    }
    numbers = {name: (weights or {}).get(name, 1.0) for name in members}
    return method, {"members": adapters, "weights": _weights(numbers, learned, adapters)}


def _weights(numbers: Mapping[str, float], learned: bool, like: Params) -> Any:
    values = {name: np.float32(value) for name, value in numbers.items()}
    found = _sum.beside(like, {name: jnp.asarray(value) for name, value in values.items()})
    return found if learned else Frozen(found)


def _check(
    members: Mapping[str, Peft], weights: Mapping[str, float], frozen: Sequence[str]
) -> None:
    if not members:
        raise ValueError("there are no adapters to combine")
    for name, method in members.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{name!r} is no name for a member; use letters, digits, - and _")
        if method.transform is not None and name not in frozen:
            raise ValueError(
                f"member {name!r} needs an optimizer of its own, which a sum of adapters does not give it; "
                "train it alone, and freeze it here"
            )
    for name in (*weights, *frozen):
        if name not in members:
            raise ValueError(f"{name!r} is no member{tree.nearest(name, members)}")


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    penalty = bind(_penalty, config) if _with_penalty(config) else None
    init, attach = bind(_init, config), bind(_attach, config)
    return Peft(init, attach, bind(_merge, config), bind(_export, config), penalty)


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    adapters = {
        name: method.init(tree.key_for(key, name), params) for name, method in config.members
    }
    for name in config.settings.frozen:
        adapters[name] = Frozen(adapters[name])
    names = [name for name, _ in config.members]
    numbers = dict(zip(names, config.weights, strict=True))
    weights = _weights(numbers, config.settings.learned, params)
    return {"members": adapters, "weights": weights}


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    found = {}
    for name, method in config.members:
        own, draws = adapter["members"][name], None
        if not tree.is_frozen(own) and key is not None:
            draws = tree.key_for(key, name)
        leaves = method.attach(params, tree.thawed(own), draws)
        found[name] = _sum.changed(params, leaves, f"member {name!r}")
    weights = tree.thawed(adapter["weights"])
    return _sum.attached(params, found, lambda who, name: weights[who])


def _merge(config: _Config, params: Params, adapter: Params) -> Params:
    return _sum.plain(params, _attach(config, params, adapter))


def _with_penalty(config: _Config) -> list[str]:
    return [
        name
        for name, method in config.members
        if method.penalty is not None and name not in config.settings.frozen
    ]


def _penalty(
    config: _Config, adapter: Params, reports: Mapping[str, Array], rows: Array
) -> tuple[Array, Metrics]:
    """The members' own, their metrics by the member's name."""
    methods, total = dict(config.members), jnp.zeros(())
    metrics: Metrics = {}
    for name in _with_penalty(config):
        penalty = methods[name].penalty
        assert penalty is not None
        own = _sum.reports_of(name, reports)
        value, more = penalty(adapter["members"][name], own, rows)
        total += value
        metrics |= {f"{name}/{key}": metric for key, metric in more.items()}
    return total, metrics


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    members = {
        name: method.export(_thawed_once(adapter["members"][name]), modules)
        for name, method in config.members
    }
    own = {"weights": adapter["weights"]}
    return member_files.export("combined", config.settings, own, members)


def _thawed_once(adapter: Params) -> Params:
    return adapter.value if tree.is_frozen(adapter) else adapter


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of `combined`, or None if they are another method's.

    Raises:
        ValueError: a setting that it does not have, numbers that are not finite, a member that its own
            method refuses.
    """
    if (read := member_files.read(files, "combined", _Settings, modules, params)) is None:
        return None
    settings, own, members = read
    numbers = {name: float(value) for name, value in tree.thawed(own["weights"]).items()}
    return together(members, numbers, frozen=settings.frozen, learned=settings.learned)

"""Parameter groups: ordered rules from names to learning rates, weight decay and freezing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from trainjax import tree
from trainjax.types import Objective, Params

Layers = Mapping[str, Sequence[int] | None]
"""By name of a leaf, the layers that the rows of its leading axis are of: `peft.trained_layers`."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters whose name a regex matches, and how they train.

    Attributes:
        match: over names such as `layers/3/attention/query/kernel`, where a stack of layers has one name a
            layer; `^embed`, `norm|bias`, `kernel/b$`, `layers/(0|1)/`.
        learning_rate: times the optimizer's; 0 freezes.
        weight_decay: in the place of the optimizer's; None for the same.
        from_step: optimizer steps for which they stay as they are, before they train (progressive
            unfreezing). The optimizer's averages of their gradients begin at once.
    """

    match: str
    learning_rate: float = 1.0
    weight_decay: float | None = None
    from_step: int = 0


class GroupsState(NamedTuple):
    """Optimizer steps done."""

    step: Int[Array, ""]


def grouped(
    make: Callable[[float], optax.GradientTransformation],
    rules: Sequence[Group],
    weight_decay: float = 0.0,
    *,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose learning rate and decay depend on the parameter's name; the first match wins.

        tx = grouped(
            lambda decay: optax.adamw(1e-4, weight_decay=decay),
            [Group(r"norm|bias", weight_decay=0.0), Group(r"layers/[0-9]/", 0.1), Group(r".*")],
            weight_decay=0.1,
        )

    The update, decay included, is multiplied by the group's `learning_rate`, which is what another learning
    rate does wherever it is the last factor, also under a schedule. What is frozen throughout has neither an
    update nor an optimizer state; frozen parameters stay bit by bit.

    Args:
        make: `(weight_decay) -> optimizer`, called once for every decay there is.
        rules: in order.
        weight_decay: where a rule has none.
        layers: of adapters that hold parts for some of the model's layers alone.

    Raises:
        ValueError: at `init`: a parameter that no rule matches; a rule that matches nothing; decays that
            differ within one stack of layers; a negative rate, decay or step.
    """
    _check(rules)

    def label(params: Params) -> Params:
        found = assign(params, rules, layers)
        return tree.map_named(lambda name, leaf: _label(name, found[name], weight_decay), params)

    decays = {weight_decay, *(g.weight_decay for g in rules if g.weight_decay is not None)}
    members = {f"decay {decay:g}": make(decay) for decay in decays}
    each = optax.partition(members | {_FROZEN: optax.set_to_zero()}, label)
    return optax.chain(_with_whole_loss(each), _scale(rules, layers))


def _with_whole_loss(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A partition whose members, which see a part of the params each, can evaluate the loss of all.

    Of a member's own part alone: an estimate of curvature is made once for each member.
    """
    each = optax.with_extra_args_support(tx)

    def update(
        updates: Params,
        state: Any,
        params: Any = None,
        *,
        objective: Objective | None = None,
        **extra: Any,
    ) -> tuple[Params, Any]:
        def whole(part: Params) -> Params:
            return jax.tree.map(
                lambda own, rest: rest if _is_masked(own) else own, part, params, is_leaf=_is_masked
            )

        def of_part(loss: Callable[..., Any]) -> Callable[..., Any]:
            return lambda part, *rest: loss(whole(part), *rest)

        if objective is not None:
            loss, bind = of_part(objective.loss), objective.bind
            extra["objective"] = objective._replace(
                loss=loss, bind=lambda other: of_part(bind(other))
            )
        return each.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(each.init, update)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def assign(
    params: Params, rules: Sequence[Group], layers: Layers | None = None
) -> dict[str, tuple[Group, ...]]:
    """By name of a leaf, its group, or where the leaf is a stack of layers that of each.

    Raises:
        ValueError: a parameter that no rule matches, or a rule that no parameter does.
    """
    patterns = [(tree.regex(group.match), group) for group in rules]
    unused = dict.fromkeys(group.match for group in rules)

    def group_of(name: str) -> Group:
        for pattern, group in patterns:
            if pattern.search(name):
                unused.pop(group.match, None)
                return group
        raise ValueError(
            f"no group matches the parameter {name}; end the groups with one for the rest, such as '.*'"
        )

    found = {}
    for name, leaf in tree.flatten(params).items():
        numbers = _layers_of(name, leaf, layers)
        names = [name] if numbers is None else [tree.numbered(name, (n,)) for n in numbers]
        found[name] = tuple(map(group_of, names))
    if unused:
        match = next(iter(unused))
        raise ValueError(
            f"the group {match!r} has no parameter: none matches, or earlier groups have them all; the "
            f"names are {', '.join(found)}"
        )
    return found


def _layers_of(name: str, leaf: Any, layers: Layers | None) -> Sequence[int] | None:
    if name.split("/")[0] != "layers":
        return None
    given = None if layers is None else layers.get(name)
    return range(leaf.shape[0]) if given is None else given


def _label(name: str, groups: tuple[Group, ...], weight_decay: float) -> str:
    if all(group.learning_rate == 0 for group in groups):
        return _FROZEN
    decays = {weight_decay if g.weight_decay is None else g.weight_decay for g in groups}
    if len(decays) > 1:
        raise ValueError(
            f"the layers of {name} are one array, and the groups give them the weight decays "
            f"{sorted(decays)}; give them one"
        )
    return f"decay {decays.pop():g}"


_FROZEN = "frozen"


def _scale(rules: Sequence[Group], layers: Layers | None) -> optax.GradientTransformation:
    """Every update times its group's learning rate, or 0 before its first step."""

    def leaf(update: Array, groups: tuple[Group, ...], count: Array) -> Array:
        starts = _over_rows([group.from_step for group in groups], update.ndim)
        rates = _over_rows([group.learning_rate for group in groups], update.ndim)
        now = (count >= starts) & (rates != 0)
        scaled = update * jnp.asarray(rates, update.dtype)
        return jnp.where(now, scaled, jnp.zeros((), update.dtype))

    def update(updates: Params, state: GroupsState, params: Any = None) -> tuple[Params, Any]:
        found = assign(updates, rules, layers)
        scaled = tree.map_named(lambda name, u: leaf(u, found[name], state.step), updates)
        return scaled, GroupsState(state.step + 1)

    return optax.GradientTransformation(
        lambda params: GroupsState(jnp.zeros((), jnp.int32)), update
    )


def _over_rows(values: Sequence[Any], ndim: int) -> np.ndarray:
    """One value, or one for each row, to broadcast against a leaf."""
    found = np.asarray(values)
    return found.reshape(()) if len(found) == 1 else found.reshape(-1, *[1] * (ndim - 1))


def _check(rules: Sequence[Group]) -> None:
    if not rules:
        raise ValueError("there are no groups; the last is usually Group('.*')")
    for group in rules:
        values = {"learning_rate": group.learning_rate, "from_step": group.from_step}
        values |= {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} of the group {group.match!r} is 0 or more")

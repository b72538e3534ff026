"""Several adapters over one base: the base's function and a weighted sum of what each adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from trainjax import tree
from trainjax.ops.matmul import dense, matmul
from trainjax.peft._matrices import merged
from trainjax.peft.lora import Lora
from trainjax.types import Params, Weight, pytree


@pytree
class Sum(Weight):
    """`x @ w + sum_m weight_m * (x @ member_m - x @ w)`: what each member adds, weighted.

    Every member costs its own product with `w`; LoRA's need none, see `summed`.

    Attributes:
        w: the frozen matrix, an array or another `Weight`.
        members: by name, each a `Weight` over `w`.
        weights: of each member, for every output or one for all.
    """

    w: Any
    members: dict[str, Any]
    weights: dict[str, Float[Array, "*stack outputs"]]

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        base = total = matmul(x, self.w)
        for name, member in self.members.items():
            total += self.weights[name].astype(x.dtype) * (matmul(x, member) - base)
        return total

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        base = total = dense(self.w)
        for name, member in self.members.items():
            total += self.weights[name][..., None, :] * (dense(member) - base)
        return total

    def reports(self, x: Float[Array, "rows in"]) -> Mapping[str, Array]:
        return {
            f"{name}.{key}": value
            for name, member in self.members.items()
            if isinstance(member, Weight)
            for key, value in member.reports(x).items()
        }


def reports_of(name: str, reports: Mapping[str, Array]) -> dict[str, Array]:
    """Reports of one member, under the names that it gives them."""
    found = {}
    for full, value in reports.items():
        path, _, last = full.rpartition("/")
        if last.startswith(f"{name}."):
            found[f"{path}/{last.removeprefix(f'{name}.')}"] = value
    return found


def changed(params: Params, attached: Params, who: str) -> dict[str, Any]:
    """The leaves that an adapter has put in the place of others, by name.

    Raises:
        ValueError: it has put some beside them.
    """
    before, after = tree.flatten(params), tree.flatten(attached)
    if more := [name for name in after if name not in before]:
        raise ValueError(
            f"{who} adds {more[0]} to the params; only adapters that change weights there are can be "
            "summed"
        )
    return {name: leaf for name, leaf in after.items() if leaf is not before[name]}


def attached(
    params: Params,
    members: Mapping[str, Mapping[str, Any]],
    weight: Callable[[str, str], Float[Array, "..."]],
) -> Params:
    """The params with the weighted sum of what members have changed.

    Args:
        params: the base.
        members: of each member what it changed, by the weight's name.
        weight: `(member, name) -> ` a number, or for a matrix `[*stack, 1]` or `[*stack, out]`.
    """
    base = tree.flatten(params)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for leaves in members.values() for name in leaves):
        own = {who: leaves[name] for who, leaves in members.items() if name in leaves}
        found[name] = summed(base[name], own, {who: weight(who, name) for who in own})
    return tree.replace(params, found)


def summed(w: Any, members: Mapping[str, Any], weights: Mapping[str, Array]) -> Any:
    """One leaf. Where all members are LoRA over `w` they are one LoRA of the sum of their ranks."""
    if not any(isinstance(member, Weight) for member in members.values()):
        parts = (weights[who] * (tree.wide(new) - tree.wide(w)) for who, new in members.items())
        return (tree.wide(w) + sum(parts)).astype(w.dtype)
    stack = w.shape[:-2]
    wide = {who: x if x.ndim else jnp.broadcast_to(x, (*stack, 1)) for who, x in weights.items()}
    if all(isinstance(member, Lora) and member.w is w for member in members.values()):
        return _side_by_side(w, members, wide)
    return Sum(w, dict(members), wide)


def _side_by_side(w: Any, members: Mapping[str, Lora], weights: Mapping[str, Array]) -> Lora:
    """With dropout, which is drawn for each, one over the other."""
    scaled = {
        who: leaf.b * (leaf.scale[..., None] * weights[who])[..., None, :]
        for who, leaf in members.items()
    }
    ones = next(iter(jax.tree.map(jnp.ones_like, leaf.scale) for leaf in members.values()))
    if any(leaf.key is not None for leaf in members.values()):
        for who, leaf in members.items():
            w = Lora(w, leaf.a, scaled[who], ones, leaf.key, leaf.dropout)
        return w
    a = jnp.concatenate([leaf.a for leaf in members.values()], axis=-1)
    return Lora(w, a, jnp.concatenate(list(scaled.values()), axis=-2), ones)


def plain(params: Params, attached: Params) -> Params:
    """The attached params with a plain array for each weight that is over another."""
    base = tree.flatten(params)
    leaves = changed(params, attached, "the sum")
    return tree.replace(
        params,
        {
            name: merged(leaf, base[name]) if isinstance(leaf, Weight) else leaf
            for name, leaf in leaves.items()
        },
    )


def beside(params: Params, small: Any) -> Any:
    """Small arrays laid out over the devices of the params, whole on each."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    return small if mesh is None else jax.device_put(small, NamedSharding(mesh, PartitionSpec()))

"""Progressive adapters: a new one trains beside earlier ones, which stay and lend what they know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from trainjax import tree
from trainjax.peft import _member_files as member_files
from trainjax.peft import _own_files as own_files
from trainjax.peft import _sum
from trainjax.peft._matrices import Parts, drawn
from trainjax.types import Frozen, Params, Peft, PeftFiles

_NEW = "new"


@dataclasses.dataclass(frozen=True)
class _Settings:
    start: float
    per_output: bool


@dataclasses.dataclass(frozen=True)
class _Config:
    new: Peft
    earlier: tuple[Peft, ...]
    settings: _Settings


def columns(
    method: Peft,
    earlier: Sequence[tuple[Peft, Params]],
    *,
    start: float = 0.0,
    per_output: bool = False,
) -> Peft:
    """`f + (f_new - f) + sum_k lateral_k (f_k - f)` at each matrix: a new adapter and what earlier ones add.

    The earlier adapters are `Frozen` parts of the new one, so no later task makes them forget, and their
    lateral weights train with it: a number for each column and matrix, each layer its own. At 0, the
    default, training starts from the base exactly, as every method here does, and an earlier column comes in
    only as far as the new task draws on it; the gradient of a lateral weight is not zero there. At 1 it
    starts from what all earlier tasks have learned together.

    In the networks of the paper a column has hidden states of its own, which the next column reads, and every
    column is a forward pass. Here there is one pass: earlier adapters see the inputs that the new column has
    at their matrix. Where all are LoRA they are one product of the sum of their ranks; other methods
    cost a product with the base's matrix for each column.

    The adapter is `{"new": adapter, "earlier": {"0": Frozen, ...}, "lateral": ...}` with an array
    `[*stack, columns, 1]` for each matrix. For the next task, `[*earlier, (method, adapter["new"])]` are the
    earlier columns.

    Args:
        method: of the new column.
        earlier: the columns before it, each a method and its adapter, as `load_adapter` gives them.
        start: first value of the lateral weights.
        per_output: a lateral weight for each output of a matrix instead of one for all.

    Raises:
        ValueError: no earlier columns; a method that changes other weights than matrices, or, of the new
            column, that has a penalty or an optimizer's link of its own.

    Source: after Rusu et al. 2016, arXiv:1606.04671, eq. 1, with adapters as columns.
    """
    if not earlier:
        raise ValueError(
            "there are no earlier columns; the first task's adapter is the method's own"
        )
    if method.transform is not None or method.penalty is not None:
        raise ValueError(
            "the new column's method has a penalty or an optimizer's link of its own, which a column "
            "does not get; use one without, such as lora"
        )
    methods = tuple(own for own, _ in earlier)
    made = _method(_Config(method, methods, _Settings(float(start), per_output)))
    return made._replace(init=_Init(made.init, tuple(adapter for _, adapter in earlier)))


@dataclasses.dataclass(
    frozen=True, eq=False
)  # arrays cannot be compared, so one is equal to itself alone
class _Init:
    init: Any
    earlier: tuple[Params, ...]

    def __call__(self, key: PRNGKeyArray, params: Params) -> Params:
        return self.init(self.earlier, key, params)


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    init, attach = bind(_init, config), bind(_attach, config)
    return Peft(init, attach, bind(_merge, config), bind(_export, config))


def _init(config: _Config, earlier: Sequence[Params], key: PRNGKeyArray, params: Params) -> Params:
    # Copied: a training step takes away the arrays of the state that it is given.
    frozen = {str(k): Frozen(jax.tree.map(jnp.copy, own)) for k, own in enumerate(earlier)}
    found = _changed(config, params, frozen)
    matrices = {name: tree.flatten(params)[name] for leaves in found.values() for name in leaves}
    for name in matrices:
        if not name.endswith("kernel"):
            raise ValueError(f"an earlier column changes {name}, which is no matrix")

    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        *stack, _, fan_out = w.shape
        outputs = fan_out if config.settings.per_output else 1
        shape = (*stack, len(earlier), outputs)
        return {"lateral": jnp.full(shape, config.settings.start, jnp.float32)}

    axes = {"lateral": (None, "out" if config.settings.per_output else None)}
    lateral = drawn(key, matrices, draw, axes)
    return {_NEW: config.new.init(key, params), "earlier": frozen, "lateral": lateral}


def _changed(
    config: _Config, params: Params, earlier: Mapping[str, Params]
) -> dict[str, dict[str, Any]]:
    """What each earlier column puts in the place of the base's matrices."""
    found = {}
    for number, method in enumerate(config.earlier):
        attached = method.attach(params, tree.thawed(earlier[str(number)]))
        found[str(number)] = _sum.changed(params, attached, f"column {number}")
    return found


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    new = config.new.attach(params, tree.thawed(adapter[_NEW]), key)
    found = {_NEW: _sum.changed(params, new, "the new column")}
    found |= _changed(config, params, adapter["earlier"])
    lateral = tree.flatten(adapter["lateral"])

    def weight(who: str, name: str) -> Array:
        if who == _NEW:
            return jnp.ones(())
        return lateral[f"{name}/lateral"][..., int(who), :]

    return _sum.attached(params, found, weight)


def _merge(config: _Config, params: Params, adapter: Params) -> Params:
    return _sum.plain(params, _attach(config, params, adapter))


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    members = {_NEW: config.new.export(adapter[_NEW], modules)}
    for number, method in enumerate(config.earlier):
        members[str(number)] = method.export(adapter["earlier"][str(number)].value, modules)
    own = {"lateral": adapter["lateral"]}
    return member_files.export("columns", config.settings, own, members)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of `columns`, or None if they are another method's.

    Raises:
        ValueError: a setting that it does not have, numbers that are not finite, a member that its own
            method refuses, lateral weights that are not this model's.
    """
    if (read := member_files.read(files, "columns", _Settings, modules, params)) is None:
        return None
    settings, own, members = read
    new, adapter = members.pop(_NEW)
    earlier = [members[str(number)] for number in range(len(members))]
    method = columns(new, earlier, **dataclasses.asdict(settings))
    frozen = {str(k): Frozen(theirs) for k, (_, theirs) in enumerate(earlier)}
    whole = {_NEW: adapter, "earlier": frozen, "lateral": own["lateral"]}
    expected = own_files.abstract(method.init, params)
    own_files.check_shapes({"lateral": whole["lateral"]}, {"lateral": expected["lateral"]})
    return method, whole

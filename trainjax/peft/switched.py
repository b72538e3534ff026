"""Several LoRA adapters over one base at once, and each row of a batch through its own.

    method, adapter = stacked([load_adapter(path, model) for path in paths], model.params)
    served = model.with_params(method.attach(model.params, adapter))
    generate(served, prompts, adapters=[0, 2, -1])

Which adapter a row goes through is `adapters` in a batch, for policies and losses, and an argument of
`generate`; -1 is the base without any. `attach` puts all adapters over the weights, and `chosen` says
which rows take which: policies and `generate` call it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import low_rank_of_rows, matmul
from trainjax.peft import _own_files as own_files
from trainjax.peft._low_rank import LowRank, factors
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    checked_dropout,
    drawn,
    dropout_keys,
    dropped,
    grouped,
    replaced,
)
from trainjax.peft.lora import Lora
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree, static

_AXES = {"a": (None, "in", None), "b": (None, None, "out")}


@pytree
class Switched(Weight):
    """`x @ w + x @ a[i] @ b[i] * scale` with an `i` for each row of a batch; nothing is added where it is -1.

    Rows of x are those of the batch, `batch * seq` of them, in their order.

    Attributes:
        w: the frozen matrix, an array or another `Weight`.
        a, b: the factors of all adapters.
        scale: one number for each matrix of the stack.
        ids: which adapter a row of the batch goes through, from -1; None until `chosen` says it.
        key: turns dropout on; one key for each matrix of the stack.
        dropout: probability that an input of the update (not of `w`) is zeroed.
    """

    w: Any
    a: Float[Array, "*stack adapters in rank"]
    b: Float[Array, "*stack adapters rank out"]
    scale: Float[Array, "*stack"]
    ids: Int[Array, "*stack batch"] | None = None
    key: Key[Array, "*stack"] | None = None
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        if self.ids is None:
            raise ValueError(
                f"there are {self.a.shape[-3]} adapters here, and nobody said which rows take which: "
                "give the batch `adapters`, or generate adapters=[...]"
            )
        rows = dropped(x, self.key, self.dropout).reshape(len(self.ids), -1, x.shape[-1])
        update = low_rank_of_rows(rows, self.a, self.b, self.ids)
        update = update.reshape(len(x), -1) * self.scale.astype(x.dtype)
        return matmul(x, self.w) + update

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        raise ValueError(_NO_MERGE)


_NO_MERGE = (
    "several adapters do not merge into one matrix: merge one of them, "
    "lora(...).merge(params, member(adapter, i))"
)


def chosen(params: Params, ids: Int[Array | np.ndarray, " batch"] | Sequence[int]) -> Params:
    """The params with the rows of a batch sent through the adapters of these numbers.

    Args:
        params: with `switched` adapters attached.
        ids: an adapter for each row, from 0; -1 for the base without any.

    Raises:
        ValueError: no adapters to choose from; a number that is none of theirs, where the numbers are
            known (in a program that is compiled they are not).
    """
    is_switched = lambda leaf: isinstance(leaf, Switched)  # noqa: E731
    found = [x for x in jax.tree.leaves(params, is_leaf=is_switched) if is_switched(x)]
    if not found:
        raise ValueError(
            "rows are to take adapters by number, and the weights have none to choose from; "
            "attach those of `switched` or `stacked`"
        )
    _check_ids(ids, found[0].a.shape[-3])

    def leaf(node: Any) -> Any:
        if not is_switched(node):
            return node
        own = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (*node.scale.shape, len(ids)))
        return dataclasses.replace(node, ids=own)

    return jax.tree.map(leaf, params, is_leaf=is_switched)


def _check_ids(ids: Any, count: int) -> None:
    if isinstance(ids, jax.core.Tracer):
        return
    for number in np.asarray(ids).tolist():
        if not -1 <= number < count:
            raise ValueError(
                f"adapter {number} is not there: they are 0 to {count - 1}, and -1 for the base"
            )


@dataclasses.dataclass(frozen=True)
class _Config:
    count: int
    rank: int
    alpha: float
    target: str
    rslora: bool
    dropout: float

    def low_rank(self) -> LowRank:
        return LowRank(self.rank, self.alpha, self.target, rslora=self.rslora)


def switched(
    count: int,
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`count` LoRA adapters that train at once, each on the rows of the batch that name it.

    Row `i` of a batch goes through adapter `batch["adapters"][i]`, and no gradient of it reaches another;
    an optimizer's weight decay and momentum move all of them in every step all the same. Which rows name
    which adapter is an input of the step: other numbers compile nothing anew. All examples packed into a
    row share its adapter.

    A row gathers its adapter's factors at each matrix, so that beside LoRA's own products a pass copies
    `rank (in + out)` numbers for each row and matrix.

    Args:
        count: how many adapters.
        rank, alpha, target, rslora, dropout: as in `lora`, of every one of them.

    Raises:
        ValueError: a count below 1; a target outside the layers, where rows of x are not those of the
            batch; settings that `lora` refuses.

    Source: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA), where kernels do what is here batched products.
    """
    if count < 1:
        raise ValueError(f"count={count}: at least one adapter")
    return _method(_Config(count, rank, float(alpha), target, rslora, checked_dropout(dropout)))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    return Peft(bind(_init, config), bind(_attach, config), _merge, bind(_export, config))


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    found = config.low_rank().targets(params)
    _check_targets(found)

    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        one = functools.partial(factors, config.low_rank(), name=name, w=w)
        return jax.vmap(one, out_axes=len(w.shape) - 2)(jax.random.split(key, config.count))

    return drawn(key, found, draw, _AXES)


def _check_targets(names: Mapping[str, Any]) -> None:
    for name in names:
        if not name.startswith("layers/"):
            raise ValueError(
                f"{name} is outside the layers, where rows of a batch are cut into chunks, so no row can "
                f"have an adapter of its own there; the default target is {ALL_LINEAR!r}"
            )


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    def leaf(name: str, w: Any, parts: Parts) -> Switched:
        stack = w.shape[:-2]
        scale = config.low_rank().scales(name, stack)
        keys = dropout_keys(key, config.dropout, name, stack)
        return Switched(w, parts["a"], parts["b"], scale, None, keys, config.dropout)

    return replaced(params, adapter, leaf)


def _merge(params: Params, adapter: Params) -> Params:
    raise ValueError(_NO_MERGE)


def member(adapter: Params, number: int) -> Params:
    """One of the adapters, as `lora` of the same rank and alpha has it."""
    return jax.tree.map(lambda leaf: leaf[..., number, :, :], adapter)


def stacked(members: Sequence[tuple[Peft, Params]], params: Params) -> tuple[Peft, Params]:
    """The method and the adapter that hold several LoRA adapters, to serve them together.

    Ranks, scales and targets may differ: a smaller rank is padded with zeros, a scale goes into `B` and an
    adapter that leaves a matrix alone has zeros there. Their dropout is not kept.

    Args:
        members: each a method and its adapter, as `load_adapter` gives them; row numbers count them.
        params: the base.

    Raises:
        ValueError: no members; one that is no plain LoRA.
    """
    if not members:
        raise ValueError("there are no adapters to stack")
    attached = [_loras(method, adapter, params, i) for i, (method, adapter) in enumerate(members)]
    names = list(dict.fromkeys(name for found in attached for name in found))
    _check_targets(dict.fromkeys(names))
    rank = max(leaf.a.shape[-1] for found in attached for leaf in found.values())
    named = {}
    for name in names:
        shape = next(found[name].shape for found in attached if name in found)
        parts = [_padded(found.get(name), shape, rank) for found in attached]
        named[f"{name}/a"], named[f"{name}/b"] = (
            jnp.stack(list(factor), axis=-3) for factor in zip(*parts, strict=True)
        )
    target = f"^({'|'.join(names)})$"
    return switched(len(members), rank, float(rank), target), tree.unflatten(named)


def _loras(method: Peft, adapter: Params, params: Params, number: int) -> dict[str, Lora]:
    leaves = tree.flatten(method.attach(params, adapter))
    found = {name: leaves[name] for name in leaves if name in grouped(adapter)}
    if not found or not all(isinstance(leaf, Lora) for leaf in found.values()):
        raise ValueError(f"adapter {number} is no plain LoRA; only those can be stacked")
    return found


def _padded(
    leaf: Lora | None, shape: tuple[int, ...], rank: int
) -> tuple[Float[Array, "*stack in {rank}"], Float[Array, "*stack {rank} out"]]:
    *stack, fan_in, fan_out = shape
    if leaf is None:
        return jnp.zeros((*stack, fan_in, rank)), jnp.zeros((*stack, rank, fan_out))
    wide = [(0, 0)] * len(stack)
    more = (0, rank - leaf.a.shape[-1])
    scaled = leaf.b * leaf.scale[..., None, None]
    return jnp.pad(leaf.a, [*wide, (0, 0), more]), jnp.pad(scaled, [*wide, more, (0, 0)])


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("switched", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapters in files of `switched`, or None if they are another method's.

    Raises:
        ValueError: a setting that it does not have, numbers that are not finite, or shapes that are
            not this model's.
    """
    return own_files.method_in(files, "switched", _Config, _method, params)

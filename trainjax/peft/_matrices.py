"""What methods that change matrices have in common: which matrices, their parts by name, their layout.

The adapter of such a method is a nested dict: under the name of each matrix its parts, such as
`layers/attention/query/kernel/a`. A part has the leading axes (layers, experts) of its matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from trainjax import axes, tree
from trainjax.ops.matmul import dense
from trainjax.types import Params

ALL_LINEAR = r"^layers/"
"""Every matrix of every layer: attention and feed-forward, not embeddings and head."""

Parts = Mapping[str, Any]
"""The arrays of one matrix (of one stack of matrices) by the part's name."""


def targets(params: Params, pattern: str, more: Collection[str] = ()) -> dict[str, Any]:
    """The matrices whose name matches the regex: kernels, not norms, biases and embeddings.

    Args:
        params: of the base.
        pattern: the regex.
        more: names of further leaves to choose from.

    Raises:
        ValueError: nothing matches.
    """
    leaves = tree.flatten(params).items()
    matrices = {name: w for name, w in leaves if name.endswith("kernel") or name in more}
    return tree.select(matrices, pattern)


def drawn(
    key: PRNGKeyArray,
    matrices: Mapping[str, Any],
    draw: Callable[[PRNGKeyArray, str, Any], Parts],
    last: Mapping[str, Sequence[str | None]],
) -> Params:
    """The parts of all matrices, in one program, each laid out over devices as its matrix is.

    Args:
        key: of the draw; a matrix gets one of its name's own, whatever other matrices there are.
        matrices: by name.
        draw: `(key, name, w) -> parts`, arrays or `Frozen` ones.
        last: of each part the last axes, as `in` or `out` of the matrix, or `experts`, which the mesh's
            axis for them splits, or None; never split then.
    """

    def parts(key: PRNGKeyArray, matrices: Mapping[str, Any]) -> Params:
        found: dict[str, Any] = {}
        for name, w in matrices.items():
            made = draw(tree.key_for(key, name), name, w)
            found |= {f"{name}/{part}": value for part, value in made.items()}
        return tree.unflatten(found)

    shapes = tree.flatten(tree.thawed(jax.eval_shape(parts, key, dict(matrices))))
    layout = _layout(matrices, last, {name: part.shape for name, part in shapes.items()})
    return jax.jit(parts, out_shardings=layout)(key, dict(matrices))


def _layout(
    matrices: Mapping[str, Any],
    parts: Mapping[str, Sequence[str | None]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Params | None:
    found: dict[str, NamedSharding] = {}
    for name, w in matrices.items():
        sharding = getattr(w, "sharding", None)
        if isinstance(w, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
            return None
        spec = tuple(sharding.spec)
        *stack, rows, columns = spec + (None,) * (len(w.shape) - len(spec))
        mesh, split = sharding.mesh, {"in": rows, "out": columns, None: None}
        for part, last in parts.items():
            sizes = shapes[f"{name}/{part}"][-len(last) :]
            own = [
                _experts(mesh, size) if axis == "experts" else split[axis]
                for axis, size in zip(last, sizes, strict=True)
            ]
            found[f"{name}/{part}"] = NamedSharding(mesh, PartitionSpec(*stack, *own))
    return tree.unflatten(found)


def _experts(mesh: Any, size: int) -> str | None:
    return (
        "expert" if axes.length(mesh, "expert") > 1 and size % mesh.shape["expert"] == 0 else None
    )


def replaced(params: Params, adapter: Params, leaf: Callable[[str, Any, Parts], Any]) -> Params:
    """The params with `leaf(name, w, parts)` in the place of each matrix that the adapter has parts of.

    Raises:
        ValueError: the adapter is of a matrix that the params do not have.
    """
    named = tree.flatten(params)
    groups = grouped(adapter)
    if unknown := [name for name in groups if name not in named]:
        raise ValueError(f"the adapter has {unknown[0]!r}, which the model does not")
    return tree.replace(params, {name: leaf(name, named[name], groups[name]) for name in groups})


def grouped(adapter: Params) -> dict[str, dict[str, Any]]:
    """The adapter's arrays, frozen ones as plain ones, by matrix and part."""
    groups: dict[str, dict[str, Any]] = {}
    for full, value in tree.flatten(tree.thawed(adapter)).items():
        name, _, part = full.rpartition("/")
        groups.setdefault(name, {})[part] = value
    return groups


def merged(weight: Any, base: Any) -> jax.Array:
    """What a weight stands for, as an array in the dtype of the base that it was put over.

    Over a quantised base float32: its matrix is the dequantised one, on which the adapter was trained.
    """
    return _dense_as(base.dtype if isinstance(base, jax.Array) else jnp.dtype("float32"), weight)


@functools.partial(jax.jit, static_argnums=0)
def _dense_as(dtype: Any, weight: Any) -> jax.Array:
    return dense(weight).astype(dtype)


def per_matrix(
    pattern: Sequence[tuple[str, Any]], default: Any, name: str, stack: Sequence[int]
) -> np.ndarray:
    """The value for each matrix of a stack: of the first pattern that matches its full name."""
    values = np.full(tuple(stack), default)
    if pattern:
        for index in np.ndindex(*stack):
            full = tree.numbered(name, index)
            found = (value for key, value in pattern if tree.regex(key).search(full))
            values[index] = next(found, default)
    return values


def dropout_keys(key: PRNGKeyArray | None, dropout: float, name: str, stack: Sequence[int]) -> Any:
    """A key for each matrix of a stack, or None where nothing is dropped."""
    if key is None or not dropout:
        return None
    return jax.random.split(tree.key_for(key, name), tuple(stack))


def dropped(x: jax.Array, key: Any, dropout: float) -> jax.Array:
    """`x` with a share of its numbers zeroed and the rest scaled up; as it is without a key."""
    if key is None or not dropout:
        return x
    kept = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
    return jnp.where(kept, x / (1.0 - dropout), jnp.zeros((), x.dtype))


def each(f: Callable[..., Any], *stacks: Any) -> Any:
    """`f` of each matrix of a stack, one after another: nothing of the whole stack's size is made.

    Args:
        f: of one matrix, in float32 `[in, out]`, and of what the others have for it.
        *stacks: first the matrix, an array or a `Weight`; then arrays with the same leading axes.
    """
    w = stacks[0]
    if len(w.shape) == 2:
        return f(dense(w), *stacks[1:])
    return jax.lax.map(lambda parts: each(f, *parts), stacks)


def checked_dropout(dropout: float) -> float:
    """The dropout.

    Raises:
        ValueError: it is no probability below 1.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a probability below 1")
    return dropout

"""Pytrees by name: names, selection by regex, partition and merge, casts and counts.

The names are those of a nested dict, joined by `/`: `layers/attention/query/kernel`. A `Weight`
counts as one leaf here, as the array does that it stands for.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from trainjax.types import Frozen, Params, Weight


def is_weight(leaf: Any) -> bool:
    """Whether a node of the params stands for one matrix, and so is one leaf to who reads names."""
    return isinstance(leaf, Weight)


def flatten(params: Params) -> dict[str, Any]:
    """The leaves by name, in the order of the tree.

    >>> flatten({"a": {"b": 1, "c": 2}, "d": 3})
    {'a/b': 1, 'a/c': 2, 'd': 3}
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(named: Mapping[str, Any]) -> Params:
    """The nested dict of names joined by `/`; the inverse of `flatten` for trees of dicts.

    >>> unflatten({"a/b": 1, "a/c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_named(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function gets the leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(_name(path), *leaves), tree, *rest, is_leaf=is_weight
    )


def select(params: Params, pattern: str) -> dict[str, Any]:
    """The leaves whose name contains a match of the regex, by name.

    Raises:
        ValueError: nothing matches; the message lists the names there are.
    """
    named = flatten(params)
    chosen = {name: leaf for name, leaf in named.items() if regex(pattern).search(name)}
    if not chosen:
        raise ValueError(
            f"no parameter's name matches {pattern!r}; the names are {', '.join(named)}"
        )
    return chosen


def regex(pattern: str) -> re.Pattern[str]:
    """The pattern, compiled.

    Raises:
        ValueError: it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def replace(params: Params, leaves: Mapping[str, Any]) -> Params:
    """`params` with the named leaves swapped; the rest is the same object.

    Raises:
        KeyError: a name that the params do not have; the message suggests the nearest.
    """
    named = flatten(params)
    for name in leaves:
        if name not in named:
            raise KeyError(f"no parameter is called {name!r}{nearest(name, named)}")
    return map_named(lambda name, leaf: leaves.get(name, leaf), params)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word that looks most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def numbered(name: str, index: Sequence[int]) -> str:
    """The name of one matrix of a stack.

    >>> numbered("layers/mlp/up/kernel", (3,))
    'layers/3/mlp/up/kernel'
    """
    first, _, rest = name.partition("/")
    return "/".join((first, *map(str, index), rest)) if index else name


def count(tree: PyTree) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """How many bytes the tree's arrays take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating-point leaves in `dtype`."""

    def leaf_cast(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(leaf_cast, tree)


def wide(x: Array) -> Array:
    """At least float32: differences and sums of bf16 numbers lose their digits."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def key_for(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key of the name's own: the same in every process and whatever else the tree holds."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def trainable(params: PyTree) -> PyTree:
    """The params with None in the place of what is `Frozen`: what an optimizer sees."""
    return jax.tree.map(lambda x: None if is_frozen(x) else x, params, is_leaf=is_frozen)


def with_trained(params: PyTree, trained: PyTree) -> PyTree:
    """The params with other numbers where they train; the inverse of `trainable`.

    Args:
        params: with `Frozen` parts or without.
        trained: a tree like `trainable(params)`.
    """
    leaf = lambda x: x is None or is_frozen(x)  # noqa: E731
    return jax.tree.map(
        lambda old, new: old if is_frozen(old) else new, params, trained, is_leaf=leaf
    )


def thawed(params: PyTree) -> PyTree:
    """The params with the arrays of `Frozen` parts as plain ones, which let no gradient through."""
    stop = lambda x: jax.tree.map(_stopped, x.value) if is_frozen(x) else x  # noqa: E731
    return jax.tree.map(stop, params, is_leaf=is_frozen)


def _stopped(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x  # not of abstract arrays


def is_frozen(leaf: Any) -> bool:
    """Whether a node of the params is marked as not training."""
    return isinstance(leaf, Frozen)


def all_finite(tree: PyTree) -> Array:
    """Whether every number of the tree is finite, as a scalar on the device."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )

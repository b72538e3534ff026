"""Work that the terms of one loss have in common is done once: the forward pass of a policy, above all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend.core import get_opaque_trace_state

T = TypeVar("T")


class _Call(NamedTuple):
    """A result, where in the program it was made, and its arguments, which keeps their ids theirs."""

    result: Any
    trace: Any
    leaves: list[Any]


_calls: ContextVar[dict[Any, _Call] | None] = ContextVar("calls", default=None)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Within it, `once` remembers; a scope inside another is part of that one."""
    if _calls.get() is not None:
        yield
        return
    token = _calls.set({})
    try:
        yield
    finally:
        _calls.reset(token)


def once(f: Callable[..., T], *args: Any) -> T:
    """`f(*args)`; if it was asked for before in this scope, of the very same arrays, that result.

    A trace of a function inside the program (the body of a loop, say) remembers its own: what was made
    in it means nothing outside. So nothing changes but the amount of work.

    Args:
        f: pure.
        *args: pytrees, compared by their structure and the identity of their leaves.
    """
    calls = _calls.get()
    if calls is None:
        return f(*args)
    leaves, structure = jax.tree.flatten(args)
    name = f, structure, tuple(map(id, leaves))
    trace = get_opaque_trace_state()
    if name not in calls or calls[name].trace != trace:
        calls[name] = _Call(f(*args), trace, leaves)
    return calls[name].result


@dataclasses.dataclass(frozen=True)
class Restore:
    """Puts a tree together from its distinct leaves; a static argument of jitted functions."""

    structure: Any
    places: tuple[int, ...]

    def __call__(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, [leaves[place] for place in self.places])


def distinct(tree: Any) -> tuple[list[Any], Restore]:
    """The leaves of a tree, arrays that are there twice only once, and how to put it together.

    To JAX an array that is an argument twice is two inputs of the program: the base weights that two
    terms of a loss hold would not be the same weights there.

    >>> x = jax.numpy.ones(2)
    >>> leaves, restore = distinct({"a": x, "b": (3.0, x)})
    >>> len(leaves), restore(["x", "y"])
    (2, {'a': 'x', 'b': ('y', 'x')})
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = jax.Array | jax.ShapeDtypeStruct
    keys = [id(leaf) if isinstance(leaf, arrays) else -i for i, leaf in enumerate(leaves, 1)]
    found = dict(zip(reversed(keys), reversed(leaves), strict=True))
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [found[key] for key in order], Restore(structure, tuple(order[key] for key in keys))

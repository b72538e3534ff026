"""Functions with a backward pass of their own, which give way where another derivative is wanted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

_backward = jax.make_user_context("own")


def any_order() -> Any:
    """A context in which functions are differentiated as they are written, in any mode and order.

    Backward passes written by hand are first derivatives in reverse mode, and save time and memory there.
    Hessian-vector products and forward mode (`jax.jvp`) need the plain function; a product with the
    Hessian is then `jax.jvp(jax.grad(f), (x,), (v,))[1]`. Its value is the same up to rounding.
    """
    return _backward("plain")


def is_any_order() -> bool:
    """Whether the program is being traced in `any_order()`."""
    return _backward.value == "plain"


def own_gradient(nondiff_argnums: Sequence[int] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`jax.custom_vjp` that is the plain function in `any_order()`; `defvjp` as there."""
    return functools.partial(OwnGradient, tuple(nondiff_argnums))


class OwnGradient:
    """A function with its own backward pass.

    Args:
        nondiff_argnums: as in `jax.custom_vjp`.
        fun: differentiable as it is written.
    """

    def __init__(self, nondiff_argnums: tuple[int, ...], fun: Callable[..., Any]) -> None:
        self._fun = fun
        self._custom = jax.custom_vjp(fun, nondiff_argnums=nondiff_argnums)
        functools.update_wrapper(self, fun)

    def __call__(self, *args: Any) -> Any:
        return self._fun(*args) if is_any_order() else self._custom(*args)

    def defvjp(self, forward: Any, backward: Any, *, symbolic_zeros: bool = False) -> None:
        """As that of `jax.custom_vjp`."""
        self._custom.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)

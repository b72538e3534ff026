"""Signatures of optimizers that hand settings on to another one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def settings_of(inner: Callable[..., Any], *fixed: str) -> Callable[[F], F]:
    """Tells in the signature of `f(learning_rate, *, own, **settings)` what `settings` may be.

    So that `help`, `optim.Chain` and the command line know them by name, and a wrong one is answered.

    Args:
        inner: to which `f` hands them on.
        fixed: of its parameters, those that `f` gives itself.

    >>> @settings_of(lambda learning_rate, *, b1=0.9, eps=1e-8: None, "eps")
    ... def mine(learning_rate, *, block=256, **settings): ...
    >>> inspect.signature(mine)
    <Signature (learning_rate, *, block=256, b1=0.9)>
    """

    def decorate(fn: F) -> F:
        own = inspect.signature(fn).parameters
        mine = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        theirs = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(inner).parameters.items()
            if name not in own and name not in fixed
        ]
        vars(fn)["__signature__"] = inspect.Signature([*mine, *theirs])
        return fn

    return decorate

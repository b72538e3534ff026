"""Coefficients of losses: numbers that a caller gives by name, refused where they mean nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from trainjax.tree import nearest


def is_number(x: Any) -> TypeGuard[float]:
    """Whether it is a Python number, whose value can be looked at; an array's cannot."""
    return isinstance(x, int | float)


def as_input(x: Any) -> Any:
    """A Python number as float32, so that 1 and 0.5 run the same program of the step."""
    return np.float32(x) if is_number(x) else x


def positive(name: str, value: Any) -> Any:
    """The value.

    Raises:
        ValueError: a number that is not above 0.
    """
    if is_number(value) and not value > 0:
        raise ValueError(f"{name}={value}: it is above 0")
    return value


def check_names(loss: Callable[..., Any], coefficients: Mapping[str, Any]) -> None:
    """Check that a loss has the coefficients, which are the parameters after its first.

    Raises:
        ValueError: it has none of that name; those that it has are named.
    """
    known = list(inspect.signature(loss).parameters)[1:]
    for name in coefficients:
        if name not in known:
            raise ValueError(
                f"{loss.__name__} has no coefficient {name!r}{nearest(name, known)}; it has "
                f"{', '.join(known)}"
            )

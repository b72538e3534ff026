"""The methods of merging by name, and which of the job's settings each takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from trainjax import merging
from trainjax.merging import adapters


def _ties_svd(density: float, rank: int | None = None) -> adapters.Combine:
    def ties(weights: Any) -> merging.Method:
        return merging.ties(weights, density, consensus=merging.counted_mean)

    return adapters.dense_svd(ties, rank)


# What they take by name are settings of the job.
OF_MODELS: Mapping[str, Callable[..., merging.Method]] = {
    "linear": merging.linear,
    "task_arithmetic": merging.task_arithmetic,
    "ties": merging.ties,
    "dare_linear": merging.dare_linear,
    "dare_ties": merging.dare_ties,
    "slerp": merging.slerp,
    "model_stock": merging.model_stock,
    "instruction_residual": merging.instruction_residual,
    "timber": merging.timber,
}
OF_ADAPTERS: Mapping[str, Callable[..., adapters.Combine]] = {
    "cat": lambda: adapters.cat,
    "svd": adapters.svd,
    "linear": lambda: adapters.linear,
    "ties_svd": _ties_svd,
}
MethodName = Literal[
    *("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "model_stock"),
    *("instruction_residual", "timber", "cat", "svd", "ties_svd"),
]


def named(
    methods: Mapping[str, Callable[..., Any]], name: str | None, kind: str
) -> Callable[..., Any]:
    """The method of that name, if it merges things of that kind."""
    if name is None:
        raise ValueError(f"--{kind} needs --method, one of {', '.join(methods)}")
    if name not in methods:
        raise ValueError(f"--method {name} does not merge {kind}; {', '.join(methods)} do")
    return methods[name]


def settings(
    config: Any, make: Callable[..., Any], others: Collection[str], count: int
) -> dict[str, Any]:
    """What a method takes of the job's settings: those that it needs are there, and no others given."""
    known = {field.name for field in dataclasses.fields(config)}
    taken = [p for p in inspect.signature(make).parameters.values() if p.name in known]
    check_read(config, f"--method {config.method}", {p.name for p in taken} | set(others))
    if config.weights and len(config.weights) != count:
        raise ValueError(f"--weights has {len(config.weights)} numbers for {count} to merge")
    values = {p.name: getattr(config, p.name) for p in taken}
    if "weights" in values:
        values["weights"] = config.weights or (1.0,) * count
    for p in taken:
        if p.default is p.empty and values[p.name] is None:
            raise ValueError(f"--method {config.method} needs --{p.name}")
    return values


def check_read(config: Any, reader: str, read: Collection[str]) -> None:
    """Raises ValueError for a setting that has been given and is not read."""
    for field in dataclasses.fields(config):
        given = getattr(config, field.name) != field.default
        if given and field.name not in {"out", "method", *read}:
            raise ValueError(f"{reader} takes no --{field.name.replace('_', '-')}")

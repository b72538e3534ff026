"""A plan as a table for people and as plain numbers for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trainjax.parallel.devices import Device
from trainjax.recipes._plan import Plan, fits

_KINDS = {
    "weights": "frozen weights",
    "trained": "what trains",
    "optimizer": "optimizer's state",
    "gradients": "gradients",
    "activations": "activations kept",
    "temporary": "temporary",
}


def told(plans: Sequence[Plan], device: Device, config: Any) -> dict[str, Any]:
    """The plans and what they are of, as JSON has it."""
    return {
        "model": config.model,
        "device": dataclasses.asdict(device),
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "plans": [
            dataclasses.asdict(plan)
            | {
                "step_seconds": plan.seconds,
                "bound": plan.roofline.bound,
                "tokens_per_second": plan.tokens / plan.seconds,
                "fits": fits(plan, device),
            }
            | _cost(plan, config)
            for plan in plans
        ],
    }


def _cost(plan: Plan, config: Any) -> dict[str, float]:
    if config.tokens is None:
        return {}
    hours = config.tokens / plan.tokens * plan.seconds / 3600
    devices = 1
    for size in plan.mesh.values():
        devices *= size
    found = {"hours": hours, "device_hours": hours * devices}
    if config.price_per_device_hour is not None:
        found["cost"] = hours * devices * config.price_per_device_hour
    return found


def show(plans: Sequence[Plan], device: Device, config: Any) -> None:
    """Prints the plans: the one in full, several as a ranking."""
    console = Console()
    if config.search:
        console.print(_ranking(plans, device, config))
    for line in _lines(plans[0], device, config):
        console.print(line)


def _lines(plan: Plan, device: Device, config: Any) -> list[Any]:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines: list[Any] = [
        f"{config.model} on {device.name}: {mesh}",
        f"remat {plan.remat}, {config.batch_size} rows of {config.max_length} tokens",
        _memory(plan, device),
        _verdict(plan, device),
    ]
    if plan.collectives:
        lines.append(_collectives(plan))
    r = plan.roofline
    lines.append(
        f"a step: {plan.model_flops:.3g} FLOPs, {plan.flops:.3g} a device with recomputing\n"
        f"time: {_time(plan.seconds)}, bound by {r.bound} (compute {_time(r.compute)} at "
        f"{config.efficiency:.0%} of the peak, memory {_time(r.memory)}, links {_time(r.overlapped)} hidden "
        f"and {_time(r.exposed)} waited for)\n"
        f"{plan.tokens / plan.seconds:,.0f} tokens/s, MFU {plan.mfu:.0%}"
    )
    if cost := _cost(plan, config):
        price = f", cost {cost['cost']:,.2f}" if "cost" in cost else ""
        lines.append(
            f"{config.tokens:.3g} tokens: {cost['hours']:,.1f} hours, "
            f"{cost['device_hours']:,.1f} device hours{price}"
        )
    return lines


def _memory(plan: Plan, device: Device) -> Table:
    table = Table("a device's memory", "GB", "figure", box=None)
    table.columns[1].justify = "right"
    measured = device.name == "cpu"
    for name, words in _KINDS.items():
        exact = name in ("weights", "trained", "optimizer")
        source = "compiler" if measured else "model"
        source = "exact" if exact else source
        table.add_row(words, f"{plan.memory[name] / 1e9:.3f}", source)
    table.add_row("total", f"{plan.memory['total'] / 1e9:.3f}", "")
    if not measured:
        cpu = f"{plan.compiler_temporary / 1e9:.3f}"
        table.add_row("(CPU compiler's temporary)", cpu, "not counted")
    return table


def _verdict(plan: Plan, device: Device) -> str:
    spare = (device.memory - plan.memory["total"]) / 1e9
    have = f"{device.memory / 1e9:.1f} GB of {device.name}"
    if spare < 0:
        return f"does not fit: {-spare:.1f} GB more than the {have}"
    return f"fits: {spare:.1f} GB of the {have} are left"


def _collectives(plan: Plan) -> Table:
    table = Table("collective", "axis", "times a step", "GB sent by a device", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in plan.collectives:
        table.add_row(row["kind"], row["axis"], f"{row['count']:,.0f}", f"{row['sent'] / 1e9:.4f}")
    return table


def _ranking(plans: Sequence[Plan], device: Device, config: Any) -> Table:
    table = Table("mesh", "remat", "GB", "", "step", "tokens/s", "MFU", box=None)
    for plan in plans:
        mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
        table.add_row(
            *(mesh, plan.remat, f"{plan.memory['total'] / 1e9:.1f}"),
            "fits" if fits(plan, device) else "does not fit",
            *(_time(plan.seconds), f"{plan.tokens / plan.seconds:,.0f}", f"{plan.mfu:.0%}"),
        )
    return table


def _time(seconds: float) -> str:
    """A duration in the unit that people would say it in.

    >>> _time(0.01234), _time(12.34)
    ('12.3 ms', '12.3 s')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

"""How long a step takes at best: arithmetic, memory and links, each at its device's published speed.

`max(compute, memory, overlapped) + exposed`: the arithmetic hides the memory's work and the collectives
over the axes that split rows (weights are fetched and gradients sent off a layer ahead); those over
other axes lie between two products, which wait for them. Compute is at `EFFICIENCY` of the peak.

Source: Williams et al. 2009, doi:10.1145/1498765.1498785, with collectives as in "How to Scale Your Model",
jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from trainjax.parallel.devices import Device, axis_bandwidth

EFFICIENCY = 0.7
"""Share of the published peak that a model's products reach where nothing holds them up: an assumption."""

OVERLAPPED = ("slice", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step.

    Attributes:
        compute: of the arithmetic.
        memory: of reading and writing the device's memory.
        overlapped: of the collectives that the arithmetic hides.
        exposed: of those that it waits for.
    """

    compute: float
    memory: float
    overlapped: float
    exposed: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return max(self.compute, self.memory, self.overlapped) + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "communication": max(self.overlapped, self.exposed),
        }
        return max(parts, key=lambda name: parts[name])


def roofline(
    device: Device,
    sizes: Mapping[str, int],
    *,
    flops: float,
    traffic: float,
    sent: Mapping[str, float],
    efficiency: float = EFFICIENCY,
) -> Roofline:
    """The times of one device's part of a step.

    Args:
        device: of what kind.
        sizes: of the mesh's axes, in order.
        flops: that the device does, repeated ones included.
        traffic: bytes that pass through its memory.
        sent: bytes that it sends, by axis.
        efficiency: share of the peak that products reach.
    """
    seconds = {axis: count / axis_bandwidth(device, sizes, axis) for axis, count in sent.items()}
    hidden = {axis for axis in seconds if set(axis.split("+")) <= set(OVERLAPPED)}
    return Roofline(
        compute=flops / (device.flops * efficiency),
        memory=traffic / device.bandwidth,
        overlapped=math.fsum(seconds[axis] for axis in hidden),
        exposed=math.fsum(seconds[axis] for axis in seconds if axis not in hidden),
    )

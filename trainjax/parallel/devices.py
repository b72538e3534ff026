"""What makers publish of their devices: the figures that a plan is computed from.

Bytes and bytes a second are of one device and of one direction; arithmetic is dense bfloat16.

TPUs: cloud.google.com/tpu/docs (pages `v4`, `v5e`, `v5p`, `v6e`); the speed of one link, of the memory
and of the network between slices from "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter
on TPUs. GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and of DGX B200; between
nodes the network cards of DGX A100 (200 Gb/s a GPU), DGX H100 and DGX B200 (400 Gb/s a GPU).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from trainjax.tree import nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: as it is called.
        flops: FLOP/s, the published dense bfloat16 peak.
        memory: bytes.
        bandwidth: bytes a second between the memory and the arithmetic.
        within: bytes a second that a device sends to its neighbours in a slice or a node, all links together.
        between: bytes a second that it sends to other slices or nodes.
        together: devices of a slice or a node.
        torus: whether the links of a slice form a torus, whose directions the axes of a mesh share; all of
            them go through a switch otherwise.
        cores: what a slice's name counts for each device: `v5p-256` has 128 chips of two cores.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    within: float
    between: float
    together: int
    torus: bool = False
    cores: int = 1


def _tpu(
    name: str,
    flops: float,
    memory: float,
    bandwidth: float,
    links: int,
    link: float,
    *,
    together: int,
    cores: int = 1,
) -> Device:
    """A TPU, by its memory in GiB and by its links to neighbours and the speed of one."""
    network = 6.25e9  # 200 Gb/s for a host of four chips
    size, within = memory * 2**30, links * link
    return Device(name, flops, size, bandwidth, within, network, together, torus=True, cores=cores)


_ALL = (
    _tpu("v4", 275e12, 32.0, 1.2e12, 6, 45e9, together=4096, cores=2),
    _tpu("v5e", 197e12, 16.0, 8.1e11, 4, 45e9, together=256),
    _tpu("v5p", 459e12, 95.0, 2.765e12, 6, 90e9, together=8960, cores=2),
    _tpu("v6e", 918e12, 32.0, 1.6e12, 4, 90e9, together=256),
    Device("a100", 312e12, 80 * 2.0**30, 2.039e12, 300e9, 25e9, 8),
    Device("h100", 989e12, 80 * 2.0**30, 3.35e12, 450e9, 50e9, 8),
    Device("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8),
    Device("b200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 8),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}
"""By name, in small letters."""


def find_device(kind: str) -> tuple[Device, int | None]:
    """A device by its name, and how many of them a slice has that is called so.

    Raises:
        ValueError: there is none of that name; the message lists those there are.

    >>> device, count = find_device("v5p-256")
    >>> device.name, count
    ('v5p', 128)
    """
    name, _, size = kind.lower().partition("-")
    if name not in DEVICES or (size and not size.isdecimal()):
        raise ValueError(
            f"there is no device {kind!r}: {', '.join(DEVICES)} and cpu are known, and slices such as "
            f"v5p-256{nearest(name, list(DEVICES))}"
        )
    device = DEVICES[name]
    return device, max(1, int(size) // device.cores) if size else None


def axis_bandwidth(device: Device, sizes: Mapping[str, int], axis: str) -> float:
    """Bytes a second that a device sends in a collective over one axis of a mesh.

    Devices are numbered with the last axis fastest; the axis `slice` is of the slow network. Where an axis
    leaves the node, the members of a group that are in one node send through as many network cards. On
    a torus the axes that have more than one device share the links evenly.

    Args:
        device: of what kind.
        sizes: of the mesh's axes, in order.
        axis: one of them, or several joined by `+`.
    """
    order, parts = list(sizes), axis.split("+")
    stride = math.prod(sizes[name] for name in order[order.index(parts[-1]) + 1 :])
    count = math.prod(sizes[name] for name in parts)
    if "slice" in parts:
        return device.between
    if stride * count > device.together:
        return min(device.within, device.between * max(1, device.together // stride))
    busy = sum(size > 1 for size in sizes.values())
    return device.within * (min(len(parts), busy) / max(1, busy) if device.torus else 1)

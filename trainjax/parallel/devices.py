"""Devices, as their makers publish them: the figures that a plan and a run's MFU are computed from.

Bytes and bytes a second are of one device and of one direction; arithmetic is dense bfloat16.

TPUs: cloud.google.com/tpu/docs (pages `v4`, `v5e`, `v5p`, `v6e`); the speed of one link, of the memory
and of the network between slices from "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter
on TPUs. GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and of DGX B200; between
nodes the network cards of DGX A100 (200 Gb/s a GPU), DGX H100 and DGX B200 (400 Gb/s a GPU). Cards: NVIDIA's
data sheets of T4 (which has float16 only: its peak is of that), L4, L40S, A10 and A10G, appendix A of its
white papers on GA102 (RTX A6000), Ada (RTX 4090) and RTX Blackwell (RTX 5090), products summed in float32;
they talk through PCIe, and a network of 25 Gb/s each is assumed. AMD's data sheet of the MI300X.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from trainjax.tree import nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: as it is called.
        kind: regex of what JAX calls it (`device_kind`).
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
    kind: str
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
    kind: str,
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
    return Device(
        name, kind, flops, size, bandwidth, within, network, together, torus=True, cores=cores
    )


def _card(
    name: str, kind: str, flops: float, memory: float, bandwidth: float, pcie: float
) -> Device:
    """A card, by its memory in GB and by the speed of its PCIe in one direction."""
    return Device(name, kind, flops, memory * 1e9, bandwidth, pcie, 3.125e9, together=8)


_ALL = (
    _tpu("v4", "v4", 275e12, 32.0, 1.2e12, 6, 45e9, together=4096, cores=2),
    _tpu("v5e", "v5 lite|v5e", 197e12, 16.0, 8.1e11, 4, 45e9, together=256),
    _tpu("v5p", "v5p|v5$", 459e12, 95.0, 2.765e12, 6, 90e9, together=8960, cores=2),
    _tpu("v6e", "v6 lite|v6e", 918e12, 32.0, 1.6e12, 4, 90e9, together=256),
    Device("a100", "A100", 312e12, 80 * 2.0**30, 2.039e12, 300e9, 25e9, 8),
    Device("h100", "H100", 989e12, 80 * 2.0**30, 3.35e12, 450e9, 50e9, 8),
    Device("h200", "H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8),
    Device("b200", "B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 8),
    Device("mi300x", "MI300X", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9, 8),
    _card("l40s", "L40S", 362e12, 48.0, 8.64e11, 32e9),
    _card("l4", r"\bL4\b", 121e12, 24.0, 3.0e11, 32e9),
    _card("a10", r"\bA10\b", 125e12, 24.0, 6.0e11, 32e9),
    _card("a10g", "A10G", 70e12, 24.0, 6.0e11, 32e9),
    _card("a6000", "RTX A6000", 154.8e12, 48.0, 7.68e11, 32e9),
    _card("rtx4090", "RTX 4090", 165.2e12, 24.0, 1.008e12, 32e9),
    _card("rtx5090", "RTX 5090", 209.5e12, 32.0, 1.792e12, 64e9),
    _card("t4", r"\bT4\b", 65e12, 16.0, 3.2e11, 16e9),
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


def device_of_kind(kind: str) -> Device | None:
    """The device that JAX calls so, if it is known.

    >>> device_of_kind("NVIDIA A100-SXM4-80GB").name, device_of_kind("TPU v5 lite").name
    ('a100', 'v5e')
    """
    return next((device for device in _ALL if re.search(device.kind, kind)), None)


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

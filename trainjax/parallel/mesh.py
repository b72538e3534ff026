"""The mesh of devices, by what each axis is for."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from trainjax import axes

_log = logging.getLogger(__name__)


def mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    sequence: int = 1,
    expert: int = 1,
    slices: int | None = None,
) -> Mesh:
    """All devices as `slices x data x fsdp x expert x sequence x tensor`; see `trainjax.axes`.

    Devices of one slice have a fast network: over the others' go copies of the model, so that gradients
    alone cross the slow one. `fsdp` and `tensor` stay within a slice.

    Args:
        data: copies of the model in a slice; each takes its part of the batch.
        fsdp: shards of every weight and optimizer state; each also takes its part of the batch.
        tensor: shards of each matrix product: heads and hidden units.
        sequence: shards of each row's tokens, for long ones.
        expert: shards of the experts of a mixture; each also takes its part of the batch.
        slices: groups of devices that a slow network joins; by default as the devices say (TPU slices),
            or 1. On nodes of GPUs it may be the number of nodes.

    One of the sizes within a slice may be -1 for what is left.

    Raises:
        ValueError: the axes do not multiply to the number of devices; slices that are not of one size.
    """
    devices = jax.devices()
    slices = _num_slices(devices) if slices is None else slices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    sizes |= {"sequence": sequence} if sequence != 1 else {}
    sizes |= {"expert": expert} if expert != 1 else {}
    sizes |= {"slice": slices} if slices != 1 else {}
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or min(sizes.values()) < -1 or 0 in sizes.values() or slices < 1:
        raise ValueError(f"mesh {_text(sizes)}: sizes are positive, and one at most is -1")
    if free and len(devices) % given == 0:
        sizes[free[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {_text(sizes)} does not multiply to the {len(devices)} devices there are"
        )
    _check_threads()
    names = [name for name in axes.ORDER if name in sizes]
    within = tuple(sizes[name] for name in names if name != "slice")
    grids = [
        mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True)
        for part in _by_slice(devices, slices)
    ]
    grid = np.stack(grids) if slices > 1 else grids[0]
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _slice_of(device: Any) -> int:
    """Slice of a TPU; nodes of GPUs have numbers too, but over their network more than gradients may go."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _num_slices(devices: Sequence[Any]) -> int:
    return len({_slice_of(device) for device in devices})


def _by_slice(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice: as they say themselves, or else those of processes side by side."""
    if _num_slices(devices) not in (1, slices):
        raise ValueError(
            f"slices={slices}, but the devices are of {_num_slices(devices)} slices; leave it out"
        )
    ordered = sorted(
        devices, key=lambda device: (_slice_of(device), device.process_index, device.id)
    )
    size = len(ordered) // slices
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    if any(_num_slices(part) > 1 for part in parts):
        raise ValueError(f"the {_num_slices(devices)} slices have unequal numbers of devices")
    return parts


def _check_threads() -> None:
    """Says where several CPU devices in one process may wait for one another for ever.

    In XLA's CPU backend a collective holds a thread until all devices have come to it, and one device
    can be in two of them at once. The threads are as many as the cores (or `NPROC`, where it is set),
    at least one a device: with few cores they may all wait for a device that has none left.
    """
    devices = jax.local_device_count()
    asked = os.environ.get("NPROC", "")
    threads = int(asked) if asked.isdecimal() else os.cpu_count() or 1
    if jax.default_backend() == "cpu" and devices > 1 and threads < 2 * devices:
        _log.warning(
            "%d CPU devices share %d threads and may hang in a collective; set NPROC=%d in the "
            "environment of the process",
            *(devices, threads, 4 * devices),
        )


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())

"""The mesh of devices, by what each axis is for."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """All devices as `data x fsdp x tensor`; one axis may be -1 for what is left.

    Args:
        data: copies of the model; each takes its part of the batch.
        fsdp: shards of every weight and optimizer state; each also takes its part of the batch.
        tensor: shards of each matrix product: heads and hidden units.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = jax.device_count()
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or min(sizes.values()) < -1 or 0 in sizes.values():
        raise ValueError(f"mesh {_text(sizes)}: sizes are positive, and one at most is -1")
    if free and count % given == 0:
        sizes[free[0]] = count // given
    if math.prod(sizes.values()) != count:
        raise ValueError(f"mesh {_text(sizes)} does not multiply to the {count} devices there are")
    devices = np.asarray(jax.devices()).reshape(tuple(sizes.values()))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=list(devices.flat),
    )


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())

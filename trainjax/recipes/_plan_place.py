"""What a plan is of: the devices, the mesh over them, the model's configuration; and what cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from trainjax import axes, parallel
from trainjax.data.pipeline import check_length
from trainjax.io.hub import read_config
from trainjax.models._model import family
from trainjax.nn import check_heads
from trainjax.parallel.devices import Device, find_device
from trainjax.recipes import _common as common
from trainjax.recipes._configs import StepConfig
from trainjax.train import metrics


def check(settings: StepConfig, hf: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises for a mesh that the model or the batch cannot be split over.

    Raises:
        ValueError: heads that `tensor` does not divide, rows that the shards of the batch do not, tokens of a
            row that `sequence` does not.
    """
    config = family(hf).config(hf)
    tensor = sizes.get("tensor", 1)
    shards = math.prod(sizes.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    if settings.full and settings.base_format is not None:
        raise ValueError(
            f"--full trains every weight, and --base-format {settings.base_format} freezes them in few "
            "bits; leave one of the two out"
        )
    check_heads(config, tensor)
    check_length(settings.max_length, sizes.get("sequence", 1))
    if settings.batch_size % (shards * settings.accumulate):
        raise ValueError(
            f"batch_size={settings.batch_size} does not split into {shards} shards of rows in "
            f"{settings.accumulate} micro-batches; use a multiple of {shards * settings.accumulate}"
        )


def place(
    kind: str, devices: int | None, mesh: common.MeshConfig
) -> tuple[Device | None, dict[str, int]]:
    """The kind of device (None for this machine) and the mesh's sizes.

    Raises:
        ValueError: a kind that is not known; sizes that do not multiply to the number of devices.
    """
    device, named = (None, None) if kind.lower() == "cpu" else find_device(kind)
    if devices is not None and named is not None and devices != named:
        raise ValueError(f"{kind} has {named} devices, and --devices says {devices}; give one")
    given = (size for size in dataclasses.asdict(mesh).values() if size not in (-1, None))
    return device, _filled(mesh, devices or named or math.prod(given))


def count(sizes: Mapping[str, int]) -> int:
    """Devices of a mesh."""
    return math.prod(sizes.values())


@dataclasses.dataclass(frozen=True)
class _Absent:
    """Stands in a mesh for a device that nobody has: layouts ask for no more."""

    id: int
    platform: str = "none"
    device_kind: str = "none"
    process_index: int = 0


def mesh_of(sizes: Mapping[str, int], *, exists: bool) -> Mesh:
    """The mesh over the devices there are, or over none, for layouts."""
    if exists:
        given = {("slices" if name == "slice" else name): size for name, size in sizes.items()}
        return parallel.mesh(**given)
    grid = np.array([_Absent(i) for i in range(count(sizes))], object)
    types = (AxisType.Auto,) * len(sizes)
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)


def read_config_of(model: str) -> dict[str, Any]:
    """The contents of a `config.json`, which may be given itself."""
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
    return read_config(model)


def has_devices(count: int) -> bool:
    """Whether this process has so many CPU devices, or can still have them: it has no others from then on."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started its devices
        return jax.default_backend() == "cpu" and jax.device_count() == count
    os.environ.setdefault("NPROC", str(4 * count))
    return jax.device_count() == count


def run_elsewhere(config: Any, count: int) -> None:
    """The same job in a process of its own, with so many devices.

    Raises:
        ValueError: what that process says that it cannot do.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    environment = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "NPROC": str(4 * count)}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as file:
        common.save_config(config, Path(file.name))
        command = [sys.executable, "-m", "trainjax.cli", "plan", "--config", file.name]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    print(done.stdout, end="")


def this_machine(settings: StepConfig) -> Device:
    """A CPU device of this machine, as a matrix product and a copy of 256 MB measure it."""
    compute = common.DTYPES[settings.dtype or "float32"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = np.ones(2**25)
    target = np.empty_like(source)
    np.copyto(target, source)
    start = time.perf_counter()
    np.copyto(target, source)
    speed = 2 * source.nbytes / (time.perf_counter() - start)
    share = jax.device_count()
    flops = (metrics.peak_flops(compute) or 0.0) / share
    return Device("cpu", "cpu", flops, memory / share, speed / share, speed / share, 1e9, share)


SHORTEST = 1024
"""Tokens that a device has of a row at least, where a search splits rows."""


def meshes(count: int, length: int) -> list[dict[str, int]]:
    """Every `data x fsdp x sequence x tensor` of so many devices.

    Args:
        count: of the devices.
        length: tokens of a row; `sequence` leaves each device `SHORTEST` of them.
    """
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    parts = [n for n in divisors if n == 1 or (length % n == 0 and length // n >= SHORTEST)]
    return [
        {"data": data, "fsdp": count // (data * sequence * tensor)}
        | ({"sequence": sequence} if sequence > 1 else {})
        | {"tensor": tensor}
        for data, sequence, tensor in itertools.product(divisors, parts, divisors)
        if count % (data * sequence * tensor) == 0
    ]


def _filled(mesh: common.MeshConfig, count: int) -> dict[str, int]:
    """The sizes by axis, the one that is -1 filled in, in the order of `parallel.mesh`."""
    asked = {name: getattr(mesh, "slices" if name == "slice" else name) for name in axes.ORDER}
    always = ("data", "fsdp", "tensor")
    sizes = {name: size for name, size in asked.items() if name in always or size not in (1, None)}
    given = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: count // given if size == -1 else size for name, size in sizes.items()}
    if math.prod(filled.values()) != count or min(filled.values()) < 1:
        text = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {text} does not multiply to {count} devices")
    return filled

"""Memory, communication, time and cost of a run on given devices, before anybody rents them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from trainjax.parallel.roofline import EFFICIENCY
from trainjax.recipes import _common as common
from trainjax.recipes import _plan as planning
from trainjax.recipes import _plan_place as places
from trainjax.recipes import _plan_report as report
from trainjax.recipes._common import MeshConfig, PeftConfig
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compiles the step of `trainjax sft` over as many devices as asked for, without any weights, and tells
    what each of them holds, sends and computes. Rows are taken to be full.
    """

    model: str
    """A hub id, a folder with a config.json or the file itself, a .gguf file, a name that `fetch` knows."""
    device: str
    """h100, h200, a100, b200, mi300x, l40s, l4, a10, a10g, a6000, rtx4090, rtx5090, t4, v4, v5e, v5p, v6e, a
    slice such as v5p-256, or cpu: this machine."""
    devices: int | None = None
    """How many; by default as the slice's name says, or what the mesh multiplies to."""
    mesh: MeshConfig = MeshConfig()
    batch_size: int = 8
    """Rows of a batch, over all devices and micro-batches."""
    max_length: int = 2048
    """Tokens of a row."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into."""
    peft: PeftConfig = PeftConfig()
    full: bool = False
    """Train every weight instead of an adapter."""
    base_format: common.BaseFormatName | None = None
    """Keep the frozen matrices of the layers in 4 or 8 bits."""
    dtype: common.DtypeName | None = None
    """Dtype of frozen weights and arithmetic; by default as stored, and what the device is fast at."""
    param_dtype: common.ParamDtypeName = "float32"
    """Dtype of what trains."""
    optim: OptimConfig = OptimConfig()
    remat: common.RematName = "projections"
    """What the backward pass keeps, from least memory (full) to most (none)."""
    packing: common.PackingName = "best-fit"
    """Several examples a row, or one."""
    efficiency: float = EFFICIENCY
    """Share of the device's published peak that its matrix products reach."""
    tokens: float | None = None
    """Tokens of the whole run, for its time and cost."""
    price_per_device_hour: float | None = None
    """What a device costs, in any currency."""
    search: bool = False
    """Try meshes and remat policies; rank those that fit by time."""
    top: int = 3
    """With --search: how many of the best are compiled."""
    json: Path | None = None
    """Write the plans to this file."""

    def settings(self) -> StepConfig:
        """As the job that trains has them."""
        names = {field.name for field in dataclasses.fields(StepConfig)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return StepConfig(**own, out=Path())


def main(config: Config) -> None:
    """Runs the job."""
    _check(config)
    device, sizes = places.place(config.device, config.devices, config.mesh)
    hf = places.read_config_of(config.model)
    places.check(config.settings(), hf, {} if config.search else sizes)
    if not places.has_devices(count := places.count(sizes)):
        places.run_elsewhere(config, count)
        return
    device = places.this_machine(config.settings()) if device is None else device
    found = (
        planning.searched(hf, config.settings(), device, count, config.efficiency, config.top)
        if config.search
        else [planning.one(hf, config.settings(), device, sizes, config.efficiency)]
    )
    told = report.told(found, device, config)
    if config.json is not None:
        config.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    report.show(found, device, config)


def _check(config: Config) -> None:
    """Raises for numbers that cannot be.

    Raises:
        ValueError: one; the message names it.
    """
    for name in ("batch_size", "max_length", "accumulate", "devices", "tokens", "top"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    if not 0 < config.efficiency <= 1:
        raise ValueError(
            f"efficiency={config.efficiency} is no share of the peak; use 0.7, or what you measured, up to 1"
        )
    if config.price_per_device_hour is not None and config.tokens is None:
        raise ValueError("--price-per-device-hour needs --tokens, the tokens of the whole run")

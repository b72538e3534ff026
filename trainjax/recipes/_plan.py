"""What one device has and does in a step: its memory, collectives and time; and a search over layouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trainjax import axes, tree
from trainjax.nn import flops_per_token
from trainjax.nn.flops import layer_weights
from trainjax.nn.footprint import Footprint, footprint
from trainjax.ops.head import tile
from trainjax.parallel.collectives import Collective, collectives
from trainjax.parallel.devices import Device
from trainjax.parallel.roofline import Roofline, roofline
from trainjax.recipes import _common as common
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._plan_place import check, mesh_of, meshes
from trainjax.recipes._plan_program import Program, local_bytes, program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device has and does in a step.

    Attributes:
        mesh: sizes by axis.
        remat: what the backward pass keeps.
        memory: bytes by kind, `total` among them.
        compiler_temporary: bytes beside the arguments in the program that was compiled for CPU devices.
        sent: bytes that a device sends, by axis.
        collectives: of the program, each kind over each axis: how many, and the bytes.
        model_flops: FLOPs of a step over all devices, without what is computed again.
        flops: of one device, with it.
        roofline: seconds.
        mfu: model FLOPs a second over the peak of all devices.
        tokens: of a step.
    """

    mesh: dict[str, int]
    remat: common.RematName
    memory: dict[str, float]
    compiler_temporary: float
    sent: dict[str, float]
    collectives: list[dict[str, Any]]
    model_flops: float
    flops: float
    roofline: Roofline
    mfu: float
    tokens: int

    @property
    def seconds(self) -> float:
        """Seconds of a step, by the roofline."""
        return self.roofline.step


def planned(
    step: Program, device: Device, *, efficiency: float, own: bool = False, compile_it: bool = True
) -> Plan:
    """What the program has and does on one device of the kind.

    Args:
        step: the program.
        device: what it is to run on.
        efficiency: share of the peak that products reach.
        own: whether the device is the one that is compiled for, a CPU: memory is the compiler's figure then.
        compile_it: without it nothing is compiled, and collectives are the least that the layout needs.
    """
    settings, model, state = step.settings, step.model, step.state
    sizes = dict(model.module.mesh.shape) if model.module.mesh is not None else {}
    width = model.module.dtype.itemsize
    own_bytes = local_bytes(tree.trainable(state.params))
    foot = _footprint(step, sizes, "cpu" if own else "accelerator")
    memory = {
        "weights": 0.0 if settings.full else local_bytes(model.params),
        "trained": local_bytes(state.params),
        "optimizer": local_bytes(state.opt_state),
        "gradients": own_bytes,
        "activations": foot.kept,
        "temporary": foot.working,
    }
    temporary, found = 0.0, []
    if compile_it:
        compiled = step.compiled(fast=not own)
        temporary = float(compiled.memory_analysis().temp_size_in_bytes)
        own_tokens = _rows(step) * settings.max_length / sizes.get("sequence", 1)
        turns = float(math.ceil(own_tokens / tile("cpu").tokens))
        found = collectives(compiled.as_text(), sizes, turns=turns)
    if own:
        rest = temporary - own_bytes
        memory["activations"] = min(foot.kept, rest)
        memory["temporary"] = rest - memory["activations"]
    memory["total"] = sum(memory.values())
    sent = sent_as_on(found, width) if compile_it else least_sent(step, sizes)
    tokens = settings.batch_size * settings.max_length
    per_token = flops_per_token(
        model.config,
        adapter_size=0 if settings.full else tree.count(state.params),
        context=settings.max_length / 2,
        full=settings.full,
    )
    needed = tokens * per_token
    devices = math.prod(sizes.values())
    flops = tokens * (per_token + foot.repeated) / devices
    traffic = _traffic(step, sizes, foot, memory)
    times = roofline(device, sizes, flops=flops, traffic=traffic, sent=sent, efficiency=efficiency)
    mfu = needed / (times.step * device.flops * devices)
    table = _table(found, width)
    return Plan(
        *(sizes, settings.remat, memory, temporary, sent, table, needed, flops, times, mfu, tokens)
    )


def _rows(step: Program) -> float:
    """Rows of a micro-batch on one device."""
    shards = axes.num_row_shards(step.model.module.mesh)
    return step.settings.batch_size / shards / step.settings.accumulate


def _footprint(step: Program, sizes: Mapping[str, int], platform: str) -> Footprint:
    return footprint(
        step.model.config,
        step.settings.remat,
        rows=_rows(step),
        length=step.settings.max_length,
        parts=sizes.get("sequence", 1),
        tensor=sizes.get("tensor", 1),
        width=step.model.module.dtype.itemsize,
        gathered=2 if sizes.get("fsdp", 1) > 1 else 1,
        trained=step.settings.full,
        head=tile(platform),
    )


def _traffic(
    step: Program, sizes: Mapping[str, int], foot: Footprint, memory: Mapping[str, float]
) -> float:
    """Bytes through one device's memory in a step: weights in every pass, the update, activations."""
    config, accumulate = step.model.config, step.settings.accumulate
    passes = 2 if foot.repeated == 0 else 3
    matrices = config.num_layers * layer_weights(config) / sizes.get("tensor", 1)
    weights = max(step.model.module.dtype.itemsize * matrices, memory["weights"])
    update = 2 * memory["optimizer"] + 4 * memory["gradients"]
    return accumulate * (passes * weights + foot.traffic) + update


def sent_as_on(found: list[Collective], width: int) -> dict[str, float]:
    """Bytes sent by axis, sums of products in the width of an accelerator's products.

    The CPU compiler sums products of bfloat16 in float32, over devices too.
    """
    total: dict[str, float] = {}
    for c in found:
        total[c.axis] = total.get(c.axis, 0.0) + _as_on(c, width)
    return dict(sorted(total.items()))


def _as_on(c: Collective, width: int) -> float:
    is_sum = c.product and c.dtype == "f32" and c.kind in ("all-reduce", "reduce-scatter")
    return c.sent * (width / 4 if is_sum else 1)


def _table(found: list[Collective], width: int) -> list[dict[str, Any]]:
    """Each kind over each axis: how many a step, and the bytes that a device sends."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for c in found:
        row = rows.setdefault(
            (c.kind, c.axis), {"kind": c.kind, "axis": c.axis, "count": 0.0, "sent": 0.0}
        )
        row["count"] += c.times
        row["sent"] += _as_on(c, width)
    return sorted(rows.values(), key=lambda row: -row["sent"])


def least_sent(step: Program, sizes: Mapping[str, int]) -> dict[str, float]:
    """The bytes that a layout needs at least, before anything is compiled.

    fsdp gathers the layers' matrices in every pass and scatters the gradients of those that train; tensor
    sums `[tokens, embed]` twice a layer and pass; sequence gathers keys and values in every pass, scatters
    their gradients, and exchanges half of the queries and outputs; data sums the gradients.
    """
    c, settings = step.model.config, step.settings
    width = step.model.module.dtype.itemsize
    data, fsdp, sequence, tensor = (
        sizes.get(axis, 1) for axis in ("data", "fsdp", "sequence", "tensor")
    )
    passes = 2 if settings.remat in ("none", "projections", "offloaded") else 3
    layers = c.num_layers * layer_weights(c) / tensor
    stored = width if settings.base_format is None else 0.52 if "nf4" in settings.base_format else 1
    grads = local_bytes(tree.trainable(step.state.params))
    of_rows = settings.batch_size * settings.max_length / (data * fsdp)
    keys = 2 * c.num_kv_heads * c.head_dim / tensor
    exchanged = passes * c.num_heads * c.head_dim / tensor * (sequence > 1)
    numbers = ((sequence - 1) * (passes + 1) * keys + exchanged) / sequence
    gathers = passes * settings.accumulate * layers * stored + (
        layers * width if settings.full else 0
    )
    sums = 2 * 2 * passes * c.num_layers * of_rows / sequence * c.hidden_size * width
    found = {
        "data": 2 * (data - 1) / data * grads,
        "fsdp": (fsdp - 1) / fsdp * gathers,
        "sequence": c.num_layers * of_rows * width * numbers,
        "tensor": (tensor - 1) / tensor * sums,
    }
    return {axis: count for axis, count in found.items() if count}


def fits(plan: Plan, device: Device) -> bool:
    """Whether the device has the memory."""
    return plan.memory["total"] <= device.memory


def one(
    hf: Mapping[str, Any],
    settings: StepConfig,
    device: Device,
    sizes: Mapping[str, int],
    efficiency: float,
    *,
    compile_it: bool = True,
) -> Plan:
    """The plan of one mesh and one remat policy."""
    mesh = mesh_of(sizes, exists=compile_it)
    own = device.name == "cpu"
    compute = common.DTYPES[settings.dtype or ("float32" if own else "bfloat16")]
    step = program(hf, settings, mesh, compute=compute)
    return planned(step, device, efficiency=efficiency, own=own, compile_it=compile_it)


def searched(
    hf: Mapping[str, Any],
    settings: StepConfig,
    device: Device,
    count: int,
    efficiency: float,
    top: int,
) -> list[Plan]:
    """The plans that fit, fastest first: all are estimated from their layout, and the best few compiled.

    Raises:
        ValueError: no mesh splits the heads and the batch.
    """
    tried, refused = [], []
    for sizes in meshes(count, settings.max_length):
        try:
            check(settings, hf, sizes)
        except ValueError as error:
            refused.append(error)
            continue
        for remat in _REMATS:
            setting = dataclasses.replace(settings, remat=remat)
            tried.append(one(hf, setting, device, sizes, efficiency, compile_it=False))
    if not tried:
        raise refused[0]
    first = sorted(tried, key=lambda plan: _rank(plan, device))[:top]
    compiled = [
        one(hf, dataclasses.replace(settings, remat=plan.remat), device, plan.mesh, efficiency)
        for plan in first
    ]
    common.say(f"{len(tried)} layouts estimated, {len(compiled)} of them compiled")
    return sorted(compiled, key=lambda plan: _rank(plan, device))


_REMATS: tuple[common.RematName, ...] = ("none", "projections", "attention", "full")


def _rank(plan: Plan, device: Device) -> tuple[bool, float, float]:
    """What fits before what does not, then by time, and by memory where the times are equal."""
    does_not = not fits(plan, device)
    return does_not, 0.0 if does_not else float(f"{plan.seconds:.2g}"), plan.memory["total"]

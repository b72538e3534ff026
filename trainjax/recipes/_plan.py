"""A step of training that is compiled over abstract arrays: its memory, its collectives, its time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainjax import axes, losses, parallel, quant, train, tree
from trainjax.io.hub import read_config
from trainjax.models import Model
from trainjax.models._model import abstract_params, family
from trainjax.nn import Decoder, flops_per_token
from trainjax.nn.flops import layer_weights
from trainjax.nn.footprint import footprint
from trainjax.parallel.collectives import Collective, collectives
from trainjax.parallel.devices import Device, find_device
from trainjax.parallel.roofline import Roofline, roofline
from trainjax.policies import policy
from trainjax.recipes import _common as common
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._training import with_penalty
from trainjax.train import metrics
from trainjax.train.step import lowered

CHUNK = 256  # tokens that go through the head at once, as in `ops.vocab`


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
        """Of a step."""
        return self.roofline.step


def abstract_model(
    hf: Mapping[str, Any], settings: StepConfig, mesh: Mesh, *, compute: Any
) -> Model:
    """The model as the job would load it, with shapes in the place of arrays."""
    config = family(hf).config(hf)
    module = Decoder(config, jnp.dtype(compute), common.REMAT[settings.remat], mesh)
    dtype = common.DTYPES[stored_dtype(hf, settings)]
    to = None if settings.base_format is None else common.BASE_FORMATS[settings.base_format]

    def leaf(name: str, w: Any) -> Any:
        layout = NamedSharding(mesh, parallel.spec(name, w.shape, mesh))
        if to is None or not re.search(quant.LAYERS, name):
            return jax.ShapeDtypeStruct(w.shape, dtype, sharding=layout)
        rows = jax.ShapeDtypeStruct((*w.shape[:-2], w.shape[-1], w.shape[-2]), dtype)
        codes = jax.eval_shape(to.encode, rows)
        return jax.tree.map(_with_layout, codes, quant.layout(codes, layout))

    params = tree.map_named(leaf, abstract_params(module))
    return Model(config, module, params, None, hf, settings.model, "")


def stored_dtype(hf: Mapping[str, Any], settings: StepConfig) -> common.DtypeName:
    """What the weights are kept in: what the settings say, or the model's `config.json`."""
    found = settings.dtype or hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if found not in common.DTYPES:
        raise ValueError(
            f"config.json says dtype={found!r}; give --dtype, one of {', '.join(common.DTYPES)}"
        )
    return found


def abstract_state(settings: StepConfig, model: Model, tx: Any) -> train.TrainState:
    """The state before the first step, laid out over the devices as `train.init` lays it out."""
    mesh, method = model.module.mesh, settings.adapter()
    assert mesh is not None  # a plan always has one
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = model.params if method is None else jax.eval_shape(method.init, key, model.params)
    narrow = jnp.dtype(common.DTYPES[settings.param_dtype])
    params = jax.eval_shape(lambda p: tree.cast(tree.cast(p, jnp.float32), narrow), params)
    base = tree.flatten(model.params)
    params = tree.map_named(lambda name, x: _with_layout(x, _like(name, x, base, whole)), params)
    trained = tree.trainable(params)
    layouts = {name: x for name, x in tree.flatten(trained).items() if x is not None}

    def slot(path: Any, x: Any) -> Any:
        name = "/".join(str(getattr(p, "key", getattr(p, "name", ""))) for p in path)
        same = (w for n, w in layouts.items() if name.endswith(f"/{n}") and w.shape == x.shape)
        found = next(same, None)
        return _with_layout(x, whole if found is None else found.sharding)

    opt_state = jax.tree_util.tree_map_with_path(slot, jax.eval_shape(tx.init, trained))
    step: Any = _with_layout(jax.ShapeDtypeStruct((), jnp.int32), whole)
    return train.TrainState(step, params, opt_state, _with_layout(key, whole))


def _like(name: str, x: Any, base: Mapping[str, Any], whole: NamedSharding) -> NamedSharding:
    """The layout of what trains: its own, or of an adapter's part that of its matrix's sides."""
    path = name.split("/")
    prefixes = ("/".join(path[:length]) for length in range(len(path), 0, -1))
    matrix = next((base[prefix] for prefix in prefixes if prefix in base), None)
    if matrix is None or not isinstance(matrix.sharding, NamedSharding):
        return whole
    if x.shape == matrix.shape:
        return matrix.sharding
    *stack, fan_in, fan_out = matrix.shape
    spec = tuple(matrix.sharding.spec) + (None,) * len(matrix.shape)
    rows, columns = spec[len(stack)], spec[len(stack) + 1]
    sides = x.shape[len(stack) :]
    if len(sides) == 2 and sides[0] == fan_in:
        last = (rows, None)
    elif sides and sides[-1] == fan_out:
        last = (*(None,) * (len(sides) - 1), columns)
    else:
        return whole
    return NamedSharding(whole.mesh, PartitionSpec(*spec[: len(stack)], *last))


def _with_layout(x: Any, layout: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def abstract_batch(settings: StepConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of full rows."""
    shape, layout = (settings.batch_size, settings.max_length), parallel.rows(mesh)
    names = {"tokens": jnp.int32, "weights": jnp.float32}
    if settings.packing != "none":
        names |= {"segments": jnp.int32, "positions": jnp.int32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in names.items()
    }


def local_bytes(shapes: Any) -> float:
    """Bytes of one device's shards of all leaves."""

    def of(x: Any) -> float:
        shard = x.sharding.shard_shape(x.shape)
        itemsize = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return float(math.prod(shard) * itemsize)

    return math.fsum(map(of, jax.tree.leaves(shapes)))


@dataclasses.dataclass(frozen=True)
class Program:
    """A step over abstract arrays, and what is known of it before it is compiled."""

    settings: StepConfig
    model: Model
    state: train.TrainState
    tx: Any

    def compiled(self, fast: bool) -> Any:
        """The program for CPU devices.

        Args:
            fast: leave out what makes machine code fast and changes neither memory nor collectives.
        """
        method, step = self.settings.adapter(), train.make_step
        own = policy(self.model, method)
        loss = with_penalty(losses.sft(own), own)
        run = step(
            self.tx, accumulate=self.settings.accumulate, gradient=self.settings.optim.gradient_of()
        )
        mesh = self.model.module.mesh
        assert mesh is not None
        batch = abstract_batch(self.settings, mesh)
        program = lowered(run, self.state, loss, batch, curvature=losses.drawn(own))
        return program.compile(compiler_options=_FAST if fast else None)


_FAST: dict[str, Any] = {
    "xla_disable_hlo_passes": "float-normalization-bf16",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def program(hf: Mapping[str, Any], settings: StepConfig, mesh: Mesh, *, compute: Any) -> Program:
    """The job's step on a model, with shapes in the place of arrays."""
    model = abstract_model(hf, settings, mesh, compute=compute)
    tx = settings.optimizer(1000, model)
    return Program(settings, model, abstract_state(settings, model, tx), tx)


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
    sequence = sizes.get("sequence", 1)
    rows = settings.batch_size / axes.num_row_shards(model.module.mesh) / settings.accumulate
    width = model.module.dtype.itemsize
    weights = 0.0 if settings.full else local_bytes(model.params)
    own_bytes = local_bytes(tree.trainable(state.params))
    spread = sizes.get("fsdp", 1) > 1
    foot = footprint(
        model.config,
        settings.remat,
        rows=rows,
        length=settings.max_length // sequence,
        tensor=sizes.get("tensor", 1),
        width=width,
        gathered=2 if spread else 1,
        chunk=CHUNK,
    )
    memory = {
        "weights": weights,
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
        turns = float(-(-rows * settings.max_length // sequence // CHUNK))
        found = collectives(compiled.as_text(), sizes, turns=turns)
    if own:
        rest = temporary - own_bytes
        memory["activations"] = min(foot.kept, rest)
        memory["temporary"] = rest - memory["activations"]
    memory["total"] = sum(memory.values())
    sent = sent_as_on(found, width) if compile_it else least_sent(step, sizes)
    tokens = settings.batch_size * settings.max_length
    needed = tokens * flops_per_token(
        model.config,
        context=settings.max_length / 2,
        adapter_size=0 if settings.full else tree.count(state.params),
        full=settings.full,
    )
    devices = math.prod(sizes.values())
    flops = (needed + tokens * foot.repeated) / devices
    passes = 2 if foot.repeated == 0 else 3
    gathered = (
        width * model.config.num_layers * layer_weights(model.config) / sizes.get("tensor", 1)
    )
    traffic = (
        passes * settings.accumulate * max(gathered, weights)
        + 2 * local_bytes(state.opt_state)
        + 4 * own_bytes
        + settings.accumulate * foot.traffic
    )
    times = roofline(device, sizes, flops=flops, traffic=traffic, sent=sent, efficiency=efficiency)
    mfu = needed / (times.step * device.flops * devices)
    table = _table(found, width)
    return Plan(
        *(sizes, settings.remat, memory, temporary, sent, table, needed, flops, times, mfu, tokens)
    )


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
    sums `[tokens, embed]` twice a layer and pass; data sums the gradients.
    """
    c, settings = step.model.config, step.settings
    width = step.model.module.dtype.itemsize
    fsdp, tensor, data = (sizes.get(axis, 1) for axis in ("fsdp", "tensor", "data"))
    passes = 2 if settings.remat in ("none", "projections", "offloaded") else 3
    layers = c.num_layers * layer_weights(c) / tensor
    stored = width if settings.base_format is None else 0.52 if "nf4" in settings.base_format else 1
    grads = local_bytes(tree.trainable(step.state.params))
    tokens = settings.batch_size * settings.max_length / (data * fsdp)
    gathers = passes * settings.accumulate * layers * stored + (
        layers * width if settings.full else 0
    )
    found = {
        "data": 2 * (data - 1) / data * grads,
        "fsdp": (fsdp - 1) / fsdp * gathers,
        "tensor": 2
        * (tensor - 1)
        / tensor
        * 2
        * passes
        * c.num_layers
        * tokens
        * c.hidden_size
        * width,
    }
    return {axis: count for axis, count in found.items() if count}


def fits(plan: Plan, device: Device) -> bool:
    """Whether the device has the memory."""
    return plan.memory["total"] <= device.memory


def check(settings: StepConfig, hf: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises for a mesh that the model or the batch cannot be split over.

    Raises:
        ValueError: heads that `tensor` does not divide; rows that the shards of the batch do not.
    """
    config = family(hf).config(hf)
    tensor = sizes.get("tensor", 1)
    shards = math.prod(sizes.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    if settings.full and settings.base_format is not None:
        raise ValueError(
            f"--full trains every weight, and --base-format {settings.base_format} freezes them in few "
            "bits; leave one of the two out"
        )
    for name, heads in (("heads", config.num_heads), ("key heads", config.num_kv_heads)):
        if heads % tensor:
            raise ValueError(
                f"tensor={tensor} does not divide the model's {heads} {name}; use a divisor of "
                f"{config.num_kv_heads}"
            )
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
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
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
    return Device("cpu", flops, memory / share, speed / share, speed / share, 1e9, share)


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
    for sizes in meshes(count):
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


def meshes(count: int) -> list[dict[str, int]]:
    """Every `data x fsdp x tensor` of so many devices."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [
        {"data": data, "fsdp": count // data // tensor, "tensor": tensor}
        for data in divisors
        for tensor in divisors
        if count % (data * tensor) == 0
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

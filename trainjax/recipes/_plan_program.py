"""The step of a job over abstract arrays: shapes and layouts in the place of weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainjax import losses, parallel, quant, train, tree
from trainjax.models import Model
from trainjax.models._model import abstract_params, family
from trainjax.nn import Decoder
from trainjax.policies import policy
from trainjax.recipes import _common as common
from trainjax.recipes._configs import StepConfig
from trainjax.recipes._layouts import like_matrix
from trainjax.recipes._training import with_penalty
from trainjax.train.step import lowered


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
    mesh, method = model.module.mesh, settings.peft_method()
    assert mesh is not None  # a plan always has one
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = model.params if method is None else jax.eval_shape(method.init, key, model.params)
    narrow = jnp.dtype(common.DTYPES[settings.param_dtype])
    params = jax.eval_shape(lambda p: tree.cast(tree.cast(p, jnp.float32), narrow), params)
    base = tree.flatten(model.params)
    params = tree.map_named(
        lambda name, x: _with_layout(x, like_matrix(name, x, base, whole)), params
    )
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
        method, step = self.settings.peft_method(), train.make_step
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
    tx = settings.optimizer(1000, model, settings.peft_method())
    return Program(settings, model, abstract_state(settings, model, tx), tx)

"""A step whose workers each take the gradient of their own rows, and say themselves how they add them up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainjax import tree
from trainjax.train.state import TrainState, init, split_opt_state
from trainjax.train.step import Step, updated, with_fixed_layout
from trainjax.types import Batch, Loss, Metrics, Params


def init_workers(
    params: Params,
    tx: optax.GradientTransformation,
    compression: optax.GradientTransformation,
    mesh: Mesh,
    key: Any = 0,
    *,
    axis: str = "data",
) -> TrainState:
    """The state before the first step: what trains and its optimizer's once, the compression's for each
    worker.

    Args:
        params: what trains.
        tx: the Optax chain, of the summed gradient.
        compression: `optim.int8(axis)` and the like.
        mesh: the devices.
        key: root of the run's randomness, or its seed.
        axis: of the mesh, whose devices are the workers.
    """
    own = compression.init(tree.trainable(params))
    count, place = mesh.shape[axis], NamedSharding(mesh, P(axis))
    each = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), own)
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    return init(everywhere, tx, key, jax.device_put(each, place))


def make_worker_step(
    tx: optax.GradientTransformation,
    compression: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = "data",
) -> Step:
    """`make_step` in which gradients are added up by `compression` and not by XLA's all-reduce.

    Every worker has the whole model (no other axis of the mesh may be longer than 1), takes the gradient
    of its rows of the batch, and hands it to `compression`, whose update returns the sum over `axis`;
    the optimizer does the same everywhere. Metrics as `make_step`, and what the compression reports.

    Args:
        tx: the Optax chain, of the summed gradient.
        compression: a transform of a worker's gradient to the sum over all; `optim.int8(axis)`, say.
        mesh: the devices.
        axis: of the mesh, whose devices are the workers.

    Raises:
        ValueError: a mesh with another axis of more than one device.
    """
    others = {name: size for name, size in mesh.shape.items() if name != axis and size > 1}
    if others:
        raise ValueError(
            f"every worker holds the whole model, and the mesh has {others} beside {axis!r}; "
            f"give all its devices to {axis!r}"
        )
    tx = optax.with_extra_args_support(tx)

    def local(state: TrainState, own: Any, loss: Loss, batch: Batch) -> Any:
        """One worker's part: its rows, its compression's state."""
        key = jax.random.fold_in(
            jax.random.fold_in(state.key, state.step), jax.lax.axis_index(axis)
        )
        batch = {**batch, "step": state.step}

        def of_trained(trained: Params) -> tuple[Any, Metrics]:
            return loss(tree.with_trained(state.params, trained), batch, key)

        trained = tree.trainable(state.params)
        (value, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
        own = jax.tree.map(lambda x: x[0], own)
        grads, own = compression.update(grads, own)
        metrics = jax.lax.psum(metrics | {"loss": value}, axis)
        return grads, jax.tree.map(lambda x: x[None], own), metrics

    def step(state: TrainState, loss: Loss, batch: Batch, extra: Any) -> tuple[TrainState, Metrics]:
        _, own = split_opt_state(state.opt_state)
        rows = jax.tree.map(lambda _: P(axis), batch)
        each = jax.tree.map(lambda _: P(axis), own)
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), each, P(), rows),
            out_specs=(P(), each, P()),
            check_vma=False,
        )
        grads, own, metrics = run(state._replace(opt_state=()), own, loss, batch)
        new, metrics = updated(state, tx, grads, metrics, own, extra)
        told = optax.tree.get(own, "metrics", {})
        return new, metrics | {name: jnp.mean(value) for name, value in told.items()}

    return with_fixed_layout(step)

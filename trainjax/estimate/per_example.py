"""Means over examples of a function of each example's own gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trainjax import platform
from trainjax.types import Batch, Loss, Params

Each = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


def mean_over_examples(
    each: Each, loss: Loss, params: Params, batches: Iterable[Batch], chunk: int = 1
) -> Params:
    """`1/N sum_n each(d loss(example n) / d params)`, in float32, laid out as the params are.

    An example is a row, and its loss is that of the row alone with weight 1 on each of its targets (the
    tokens of weight above 0), so it does not depend on what else is in the batch. Rows without a
    target are not counted.

    Args:
        each: of a gradient array, elementwise and 0 at 0; module-level.
        loss: of a batch with `weights`.
        params: where the gradients are taken; floating point.
        batches: of one example a row, a finite number of them, such as `data.one_epoch` gives.
        chunk: rows whose gradients are held at once; it divides the rows of a batch, or they are
            filled up with rows that have no target. 1 takes the least memory: the result, and one gradient.

    Raises:
        ValueError: packed rows; no row with a target; a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one row's gradient is held")
    layout = jax.tree.map(lambda leaf: leaf.sharding, jax.tree.map(jnp.asarray, params))
    leaves, structure = jax.tree.flatten(layout)
    add, divide = _programs(each, chunk, structure, tuple(leaves))
    total = jax.tree.map(
        lambda leaf, place: jnp.zeros(leaf.shape, jnp.float32, device=place), params, layout
    )
    count = jnp.zeros((), jnp.int32)  # on the device: no batch waits for the one before it
    for batch in batches:
        check_unpacked(batch)
        total, rows = add(total, loss, params, batch)
        count += rows
    if not count:
        raise ValueError("no row of the batches has a target (a token of weight above 0)")
    return divide(total, count.astype(jnp.float32))


def check_unpacked(batch: Batch) -> None:
    """One example a row.

    Raises:
        ValueError: a row holds several.
    """
    segments = batch.get("segments")
    if segments is not None and (most := int(jnp.max(segments))) > 1:
        raise ValueError(
            f"a row of the batch packs {most} examples, and a gradient per example needs one a row: "
            "plan the batches with `data.unpacked`"
        )


@functools.cache
def _programs(each: Each, chunk: int, structure: Any, leaves: tuple[Any, ...]) -> Any:
    """The jitted sum over a batch, which takes over the memory of the total, and the division."""
    layout = jax.tree.unflatten(structure, leaves)
    compile_ = functools.partial(jax.jit, compiler_options=platform.compiler_options())
    add = compile_(
        functools.partial(_add_batch, each, chunk), donate_argnums=0, out_shardings=(layout, None)
    )
    divide = compile_(
        lambda total, count: jax.tree.map(lambda leaf: leaf / count, total),
        donate_argnums=0,
        out_shardings=layout,
    )
    return add, divide


def _add_batch(
    each: Each, chunk: int, total: Params, loss: Loss, params: Params, batch: Batch
) -> tuple[Params, Int[Array, ""]]:
    targets = batch["weights"] != 0
    rows = {**batch, "weights": targets.astype(jnp.float32)}
    chunks = jax.tree.map(lambda leaf: _chunked(leaf, chunk), rows)

    def of_row(row: Batch) -> Params:
        alone = jax.tree.map(lambda leaf: leaf[None], row)
        gradient = jax.grad(lambda params: loss(params, alone)[0])(params)
        return jax.tree.map(lambda leaf: each(leaf.astype(jnp.float32)), gradient)

    def of_chunk(total: Params, rows: Batch) -> tuple[Params, None]:
        if chunk == 1:  # a vmap over one row would cost the head's loop its early end
            values = of_row(jax.tree.map(lambda leaf: leaf[0], rows))
        else:
            values = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.vmap(of_row)(rows))
        return jax.tree.map(jnp.add, total, values), None

    total, _ = jax.lax.scan(of_chunk, total, chunks)
    return total, jnp.sum(jnp.any(targets.reshape(len(targets), -1), axis=1))


def _chunked(rows: Array, chunk: int) -> Array:
    """`[rows, ...] -> [chunks, chunk, ...]`, filled up with rows of zeros."""
    padding = ((0, -rows.shape[0] % chunk), *((0, 0),) * (rows.ndim - 1))
    return jnp.pad(rows, padding).reshape(-1, chunk, *rows.shape[1:])

"""Sparse masks: a few chosen entries of each matrix train, and the others stay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dense, matmul
from trainjax.peft import _own_files as own_files
from trainjax.peft._matrices import ALL_LINEAR, drawn, grouped, merged, replaced, targets
from trainjax.types import Frozen, Params, Peft, PeftFiles, Weight, pytree


@pytree
class Sparse(Weight):
    """`x @ (w + values at indices)`: a matrix of which some entries train.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        indices: of the entries in each matrix, row by row: `row * out + column`.
        values: what is added to them; both with the same leading axes.
    """

    w: Any
    indices: Int[Array, "*stack entries"]
    values: Float[Array, "*stack entries"]

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return _product(x, self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`w` with the values added, in float32."""
        return _added(dense(self.w), self.indices, self.values)


# Computed again in the backward pass: the sum of a layer would be kept for each layer otherwise, and
# together they are another copy of the model.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _product(x: Array, w: Sparse) -> Array:
    return matmul(x, w.dense())


def _added(w: Array, indices: Array, values: Array) -> Array:
    if w.ndim > 2:
        return jax.vmap(_added)(w, indices, values)
    rows, columns = jnp.divmod(indices, w.shape[1])
    return w.at[rows, columns].add(values)


@dataclasses.dataclass(frozen=True)
class _Config:
    density: float
    target: str

    def entries(self, shape: tuple[int, ...]) -> int:
        """How many entries of each matrix train."""
        return max(1, round(self.density * shape[-2] * shape[-1]))


def sparse(density: float = 0.005, target: str = ALL_LINEAR) -> Peft:
    """`W + S` with `S` zero but for a share `density` of the entries, which are chosen once.

    Which ones, `init(key, params, scores)` takes from a tree of scores like the params, those with the
    largest absolute score: gradients for top-`|g|`, squared ones for FISH masks. Without scores they
    are drawn at random. The number is fixed for each matrix (`round(density * in * out)`, at least 1),
    not over all of them as in the paper, so shapes do not depend on scores.

        loss = tj.losses.sft(tj.policy(model))  # of the whole model
        scores = tj.estimate.fisher(loss, model.params, batches)
        adapter = method.init(jax.random.key(0), model.params, scores)

    Costs `density` of the entries as trained numbers, and as many int32. The forward pass adds them
    to one layer's matrix at a time, in float32. The backward pass makes the gradient of that whole
    matrix, a product as in full tuning, and keeps the entries' part: memory is saved and compute not.

    Args:
        density: share of each matrix that trains, in (0, 1]; the paper's is 0.005.
        target: regex over parameter names such as `layers/attention/query/kernel`.

    Raises:
        ValueError: density outside (0, 1]; a regex that matches nothing; scores that lack a target,
            have another shape or are not finite.

    Source: Sung et al. 2021, arXiv:2111.09839, section 3 (FISH masks).
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} is a share of the entries, above 0 and at most 1")
    return _method(_Config(float(density), target))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    return Peft(bind(_init, config), _attach, _merge, bind(_export, config))


def _init(
    config: _Config, key: PRNGKeyArray, params: Params, scores: Params | None = None
) -> Params:
    found = targets(params, config.target)
    matrices = found if scores is None else _scores(found, scores)
    draw = functools.partial(_entries, config, scores is None)
    return drawn(key, matrices, draw, {"indices": (None,), "values": (None,)})


def _scores(found: Mapping[str, Any], scores: Params) -> dict[str, Array]:
    named = tree.flatten(scores)
    for name, w in found.items():
        if name not in named:
            raise ValueError(f"the scores have none of {name}; they are like the params")
        if named[name].shape != w.shape:
            raise ValueError(
                f"the scores of {name} are {named[name].shape}, the matrix is {w.shape}"
            )
        if not tree.all_finite(named[name]):
            raise ValueError(f"the scores of {name} are not all finite")
    return {name: named[name] for name in found}


def _entries(
    config: _Config, at_random: bool, key: PRNGKeyArray, name: str, scores: Any
) -> dict[str, Any]:
    """The chosen entries of each matrix of a stack, one matrix at a time."""
    *stack, fan_in, fan_out = scores.shape
    size, count = fan_in * fan_out, config.entries(scores.shape)

    def best(ranking: Array) -> Array:
        return jnp.sort(lax.top_k(ranking, count)[1])

    if at_random:
        keys = jax.random.split(key, int(np.prod(stack, dtype=int)))
        chosen = lax.map(lambda own: best(jax.random.bits(own, (size,))), keys)
    else:
        chosen = lax.map(best, jnp.abs(scores).reshape(-1, size))
    shape = (*stack, count)
    return {"indices": Frozen(chosen.reshape(shape)), "values": jnp.zeros(shape, jnp.float32)}


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    """Nothing of it is random: the key has no effect."""
    return replaced(params, adapter, lambda name, w, parts: Sparse(w, **parts))


def _merge(params: Params, adapter: Params) -> Params:
    return replaced(params, adapter, lambda name, w, parts: merged(Sparse(w, **parts), w))


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("sparse", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are of another method.

    Raises:
        ValueError: a setting that is not known, an array of another shape than this model's, an index
            that is no entry of its matrix or comes twice.
    """
    if (found := own_files.method_in(files, "sparse", _Config, _method, params)) is None:
        return None
    named = tree.flatten(params)
    for name, parts in grouped(found[1]).items():
        w, indices = named[name], np.asarray(parts["indices"])
        rising = (np.diff(indices, axis=-1) > 0).all()
        if not rising or indices.min() < 0 or indices.max() >= w.shape[-2] * w.shape[-1]:
            raise ValueError(
                f"the adapter's {name}/indices are not distinct entries, in order, of a matrix of "
                f"{w.shape[-2]} x {w.shape[-1]}"
            )
    return found

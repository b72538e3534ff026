"""PiSSA: LoRA that begins at the principal singular vectors of each matrix, with the rest frozen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.peft import _low_rank as low_rank
from trainjax.peft._low_rank import LowRank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    drawn,
    dropout_keys,
    each,
    grouped,
    merged,
    replaced,
)
from trainjax.peft.lora import Lora
from trainjax.types import Frozen, Params, Peft, PeftFiles

AXES = low_rank.AXES | {"start_a": ("in", None), "start_b": (None, "out")}


@dataclasses.dataclass(frozen=True)
class Pissa:
    """The settings; see `pissa`."""

    update: LowRank
    niter: int | None


def pissa(
    rank: int = 16,
    alpha: float = 16.0,
    target: str = ALL_LINEAR,
    *,
    niter: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`W - s A_0 B_0 + s A B` with `s A_0 B_0` the best approximation of `W` of that rank.

    `A` and `B` start at `A_0 = U sqrt(S / s)` and `B_0 = sqrt(S / s) V^T` of the singular value
    decomposition, `s = alpha / rank`. The base stays as it is, so that it is still the reference; the
    start is a `Frozen` part that the forward pass takes off again. `residual` folds it into the base.

    The files are LoRA's, of twice the rank (`[A, A_0]` and `[B, -B_0]`), which PEFT loads over the plain
    base, as after its own conversion; here they are read as `lora`. A file of PEFT that was not converted
    is read as `pissa`.

    Args:
        rank: number of singular vectors.
        alpha: numerator of the scale; by default the scale is 1, as in the paper.
        target, rank_pattern, alpha_pattern, rslora: as in `lora`.
        niter: passes of randomised subspace iteration in the place of the whole decomposition, which on a
            CPU takes seconds a matrix; the more passes, the nearer to it (the paper takes 4 to 16).
        dropout: on the trained update's input, in training only.

    Raises:
        ValueError: as `lora`; niter below 0.

    Source: Meng et al. 2024, arXiv:2404.02948, eq. 2-4. Agrees with PEFT 0.21
    `init_lora_weights="pissa"` up to signs.
    """
    if niter is not None and niter < 0:
        raise ValueError(f"niter={niter}: a number of passes, or None for the whole decomposition")
    update = low_rank.low_rank(rank, alpha, target, rank_pattern, alpha_pattern, rslora, dropout)
    return _method(Pissa(update, niter))


@functools.cache
def _method(config: Pissa) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: Pissa, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        return _start(config, key, name, w)

    return drawn(key, config.update.targets(params), draw, AXES)


def _start(config: Pissa, key: PRNGKeyArray, name: str, w: Any) -> dict[str, Any]:
    """The factors, and the frozen start `start_a start_b`, whose second factor has the scale in it."""
    stack = w.shape[:-2]
    ranks, scales = config.update.ranks(name, stack), config.update.scales(name, stack)
    rank = int(ranks.max())
    top = functools.partial(_top, rank=rank, niter=config.niter)
    a, s, b = each(top, w, jax.random.split(key, stack))
    # Beyond a smaller rank of the stack both factors are zero, and stay so.
    used = np.arange(rank) < ranks[..., None]
    roots = jnp.where(used, jnp.sqrt(s / scales[..., None]), 0.0)
    a, b = a * roots[..., None, :], b * roots[..., None]
    start_b = b * scales[..., None, None]
    return {"a": a, "b": b, "start_a": Frozen(a), "start_b": Frozen(start_b)}


def _top(
    matrix: Float[Array, "in out"], key: PRNGKeyArray, *, rank: int, niter: int | None
) -> tuple[Float[Array, "in rank"], Float[Array, " rank"], Float[Array, "rank out"]]:
    """The largest singular values and their vectors; of each the largest entry on the left is positive."""
    with jax.default_matmul_precision("highest"):
        if niter is None:
            u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            basis = _range(matrix, key, min(2 * rank, *matrix.shape), niter)
            u, s, v = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
            u = basis @ u
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    signs = jnp.where(largest < 0, -1.0, 1.0)
    return u * signs, s, v * signs.T


def _range(
    matrix: Float[Array, "in out"], key: PRNGKeyArray, width: int, niter: int
) -> Float[Array, "in width"]:
    """An orthonormal basis of nearly the space of the largest singular vectors on the left.

    Source: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """
    orthonormal = lambda x: jnp.linalg.qr(x)[0]  # noqa: E731
    probes = jax.random.normal(key, (matrix.shape[1], width), jnp.float32)
    again = lambda _, q: orthonormal(matrix @ orthonormal(matrix.T @ q))  # noqa: E731
    return jax.lax.fori_loop(0, niter, again, orthonormal(matrix @ probes))


def _weight(
    config: Pissa, key: PRNGKeyArray | None, name: str, w: Any, parts: Mapping[str, Array]
) -> Lora:
    stack, update = w.shape[:-2], config.update
    b = parts["b"] * update.scales(name, stack)[..., None, None]
    ones = jnp.ones(stack, jnp.float32)
    keys = dropout_keys(key, update.dropout, name, stack)
    if keys is not None:
        rest = Lora(w, parts["start_a"], -parts["start_b"], ones)
        return Lora(rest, parts["a"], b, ones, keys, update.dropout)
    # As one product what the start takes off and what the factors put back cancel in its sum, which is
    # in float32 also where x is bfloat16; they are the largest part of `x @ w`.
    a = jnp.concatenate([parts["a"], parts["start_a"]], axis=-1)
    return Lora(w, a, jnp.concatenate([b, -parts["start_b"]], axis=-2), ones)


def _attach(
    config: Pissa, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    return replaced(params, adapter, functools.partial(_weight, config, key))


def _merge(config: Pissa, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        return merged(_weight(config, None, name, w, parts), w)

    return replaced(params, adapter, leaf)


def residual(params: Params, adapter: Params) -> tuple[Params, Params]:
    """The base without the start, and the factors that `lora` of the same settings trains over it.

    What the paper quantises: the residual has a narrower distribution than the base.

    Args:
        params: the base.
        adapter: of `pissa`, at any step.

    Returns:
        Params with arrays in the base's dtype (of a quantised base float32), and an adapter for `lora`
        that makes with them the function that `pissa` makes with the base.
    """

    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        start_a, start_b = parts["start_a"], parts["start_b"]
        return merged(Lora(w, start_a, -start_b, jnp.ones(w.shape[:-2], jnp.float32)), w)

    trained = {
        f"{name}/{part}": parts[part] for name, parts in grouped(adapter).items() for part in "ab"
    }
    return replaced(params, adapter, leaf), tree.unflatten(trained)


def _export(config: Pissa, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    update, found = config.update, {}
    for name, parts in grouped(adapter).items():
        stack = parts["a"].shape[:-2]
        scales = np.asarray(update.scales(name, stack))[..., None, None]
        a = np.concatenate([parts["a"], parts["start_a"]], axis=-1)
        b = np.concatenate([parts["b"], -parts["start_b"] / scales], axis=-2)
        # What pads a smaller rank goes to the end, where the file leaves it out.
        inner = np.arange(a.shape[-1]) % (a.shape[-1] // 2)
        order = np.argsort(inner >= update.ranks(name, stack)[..., None], axis=-1, kind="stable")
        found[f"{name}/a"] = np.take_along_axis(a, order[..., None, :], axis=-1)
        found[f"{name}/b"] = np.take_along_axis(b, order[..., None], axis=-2)
    return low_rank.export(_doubled(update), tree.unflatten(found), modules)


def _doubled(update: LowRank) -> LowRank:
    """The settings of twice the rank and the same scale."""
    factor = math.sqrt(2) if update.rslora else 2.0
    return dataclasses.replace(
        update,
        rank=2 * update.rank,
        alpha=factor * update.alpha,
        rank_pattern=tuple((name, 2 * rank) for name, rank in update.rank_pattern),
        alpha_pattern=tuple((name, factor * alpha) for name, alpha in update.alpha_pattern),
    )


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of an unconverted PiSSA.

    Args:
        files: settings, and tensors by `<module>.lora_A.weight`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base before PEFT took the start off, as it is in the model's own files.

    Raises:
        ValueError: as `lora.from_peft`; a start that torch drew at random.
    """
    start = str(files.fields.get("init_lora_weights"))
    if files.fields.get("peft_type") != "LORA" or not start.startswith("pissa"):
        return None
    if start != "pissa":
        raise ValueError(
            f"the adapter's configuration sets init_lora_weights={start!r}: its start came from torch's "
            "random numbers, which are not made here; convert it to LoRA in PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    plain = files._replace(fields=files.fields | {"init_lora_weights": True})
    update, factors, unknown = low_rank.read(plain, modules, params)
    adapter: dict[str, Any] = dict(factors)
    low_rank.refuse_unknown(unknown)
    config = Pissa(update, None)
    leaves = tree.flatten(params)
    for name in dict.fromkeys(name.rpartition("/")[0] for name in adapter):
        parts = jax.jit(functools.partial(_start, config), static_argnums=1)(
            jax.random.key(0), name, leaves[name]
        )
        used = jnp.any(adapter[f"{name}/a"] != 0, axis=-2)[..., None, :]  # not in layers left out
        adapter[f"{name}/start_a"] = Frozen(jnp.where(used, parts["start_a"].value, 0.0))
        adapter[f"{name}/start_b"] = parts["start_b"]
    return _method(config), tree.unflatten(adapter)

"""DoRA: a low-rank update of a matrix's directions, and the lengths of its columns trained apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dense, matmul, through
from trainjax.ops.matmul import low_rank as low_rank_product
from trainjax.peft import _low_rank as low_rank
from trainjax.peft._low_rank import LowRank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    drawn,
    dropout_keys,
    dropped,
    each,
    merged,
    replaced,
)
from trainjax.types import Frozen, Params, Peft, PeftFiles, Weight, pytree, static

AXES = low_rank.AXES | {"magnitude": ("out",), "norms": ("out",)}
_TINY = float(jnp.finfo(jnp.float32).tiny)


@pytree
class Dora(Weight):
    """`x @ (w + a b scale) * magnitude / norm`, the norm of each column of a sum that is never made.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        a, b: the update's factors, with the same leading axes.
        scale: one number for each matrix of the stack.
        magnitude: the length of each column.
        norms: the length of each column of `w`.
        key: turns dropout on; one key for each matrix of the stack. None in evaluation.
        dropout: probability that an input is zeroed, of the update and of what is added to `x @ w`.
    """

    w: Any
    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack rank out"]
    scale: Float[Array, "*stack"]
    magnitude: Float[Array, "*stack out"]
    norms: Float[Array, "*stack out"]
    key: Key[Array, "*stack"] | None = None
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        a, b = self._factors(x.dtype)
        return self._scaled(x, lambda x: matmul(x, self.w), lambda x: low_rank_product(x, a, b))

    def through(self, product: Callable[[Array, Array], Array], x: Array) -> Array:
        """As `x @ w`, with the same norms, for another product: of a convolution, PEFT 0.21's `Conv2d`."""
        a, b = self._factors(x.dtype)

        def update(x: Array) -> Array:
            thin = product(x, a)
            return matmul(thin.reshape(-1, thin.shape[-1]), b).reshape(*thin.shape[:-1], -1)

        return self._scaled(x, lambda x: through(product, x, self.w), update)

    def _factors(self, dtype: Any) -> tuple[Array, Array]:
        b = self.b * self.scale[..., None, None]
        return self.a.astype(dtype), b.astype(dtype)

    def _scaled(
        self, x: Array, of_base: Callable[[Array], Array], of_update: Callable[[Array], Array]
    ) -> Array:
        """The products with `w` and with `a b scale`, each output by its magnitude over its norm."""
        factor = self.magnitude / self._norm()
        dropped_x = dropped(x, self.key, self.dropout)
        update, base = tree.wide(of_update(dropped_x)), tree.wide(of_base(x))
        # The factor begins at 1 and moves by less than bfloat16 can tell from 1: it stays in float32.
        if dropped_x is x:
            return (factor * (base + update)).astype(x.dtype)
        # PEFT's order: what DoRA adds to the base's product is of the inputs that were not dropped.
        moved = (factor - 1) * tree.wide(of_base(dropped_x))
        return (base + moved + factor * update).astype(x.dtype)

    def _norm(self) -> Float[Array, " out"]:
        """The length of each column of `w + a b scale`, a constant to the gradient.

        `|w_j|^2 + 2 s b_j . (a^T w)_j + s^2 b_j . (a^T a) b_j`, in float32: the last term alone is as
        small as the squared update.
        """
        a, b, scale, norms = jax.lax.stop_gradient((self.a, self.b, self.scale, self.norms))
        b = b * scale
        with jax.default_matmul_precision("highest"):
            crossed = matmul(a.T, self.w)
            squared = norms**2 + jnp.sum(b * (2 * crossed + (a.T @ a) @ b), axis=0)
        norm = jnp.sqrt(jnp.maximum(squared, _TINY))  # a column of zeros has no direction
        return jax.lax.stop_gradient(norm)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`(w + a b scale) magnitude / norm`, in float32."""
        total = dense(self.w) + self.a @ (self.b * self.scale[..., None, None])
        norm = jnp.maximum(jnp.linalg.norm(total, axis=-2), _TINY**0.5)
        return total * (self.magnitude / norm)[..., None, :]


def dora(
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`m (W + s A B) / |W + s A B|` on the matrices whose name matches `target`, `|.|` of each output.

    `m` starts as the norms of the base, `A` and `B` as in `lora`, so the adapter starts as the identity.
    The norm gets no gradient (section 4.3 of the paper). The base's norms are a `Frozen` part.

    Args:
        rank: inner size of the update.
        alpha: numerator of its scale, `s = alpha / rank`.
        target: regex over parameter names such as `layers/attention/query/kernel`.
        rank_pattern, alpha_pattern: other values for the matrices whose name, with the layer's
            number in it (`layers/3/mlp/up/kernel`), matches a regex; the first match wins.
        rslora: scale by `alpha / sqrt(rank)` instead.
        dropout: on the inputs, in training only; with it the base's product is computed twice.

    Raises:
        ValueError: as `lora`.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and 11. Agrees with PEFT 0.21 `use_dora`.
    """
    return _method(
        low_rank.low_rank(rank, alpha, target, rank_pattern, alpha_pattern, rslora, dropout)
    )


@functools.cache
def _method(config: LowRank) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: LowRank, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        norms = _norms(w)
        factors = low_rank.factors(config, key, name, w)
        return {**factors, "magnitude": norms, "norms": Frozen(norms)}

    return drawn(key, config.targets(params), draw, AXES)


def _norms(w: Any) -> Float[Array, "*stack out"]:
    """The length of each column."""
    return each(lambda matrix: jnp.linalg.norm(matrix, axis=0), w)


def _weight(
    config: LowRank, key: PRNGKeyArray | None, name: str, w: Any, parts: Mapping[str, Array]
) -> Dora:
    stack = w.shape[:-2]
    return Dora(
        w,
        parts["a"],
        parts["b"],
        config.scales(name, stack),
        parts["magnitude"],
        parts["norms"],
        dropout_keys(key, config.dropout, name, stack),
        config.dropout,
    )


def _attach(
    config: LowRank, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    return replaced(params, adapter, functools.partial(_weight, config, key))


def _merge(config: LowRank, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        return merged(_weight(config, None, name, w, parts), w)

    return replaced(params, adapter, leaf)


def _export(config: LowRank, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    fields, tensors = low_rank.export(config, adapter, modules)
    for full, magnitude in tree.flatten(adapter).items():
        name, _, part = full.rpartition("/")
        if part == "magnitude":
            for index in np.ndindex(*magnitude.shape[:-1]):
                module = modules[tree.numbered(name, index)]
                tensors[_tensor(module)] = np.ascontiguousarray(magnitude[index])
    return PeftFiles(fields | {"use_dora": True}, tensors)


def _tensor(module: str) -> str:
    return f"{module}.lora_magnitude_vector"


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of DoRA.

    A layer of a stack that the file leaves out begins as the base.

    Args:
        files: settings, and tensors by `<module>.lora_A.weight`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes and the norms of its columns.

    Raises:
        ValueError: a setting that changes the function and is not supported, a tensor of a module that
            the model does not have, a shape that does not fit, a number that is not finite; each by name.
    """
    if files.fields.get("peft_type") != "LORA" or not files.fields.get("use_dora"):
        return None
    if any(".lora_embedding_" in name for name in files.tensors):
        raise ValueError(
            "the adapter is of DoRA on the embedding, which is not supported; LoRA on it is"
        )
    config, factors, others = low_rank.read(files, modules, params)
    adapter: dict[str, Any] = dict(factors)
    leaves = tree.flatten(params)
    for name in dict.fromkeys(name.rpartition("/")[0] for name in adapter):
        norms = jax.jit(_norms)(leaves[name])
        magnitude = np.array(norms)
        for index in np.ndindex(*norms.shape[:-1]):
            module = modules.get(tree.numbered(name, index), "")
            if f"{module}.lora_A.weight" in files.tensors:
                magnitude[index] = _checked(module, others.pop(_tensor(module), None), norms.shape)
        adapter[f"{name}/magnitude"] = jnp.asarray(magnitude)
        adapter[f"{name}/norms"] = Frozen(norms)
    low_rank.refuse_unknown(others)
    return _method(config), tree.unflatten(adapter)


def _checked(module: str, magnitude: Any, shape: tuple[int, ...]) -> np.ndarray:
    if magnitude is None:
        raise ValueError(f"{module} has no lora_magnitude_vector, which use_dora=True asks for")
    if magnitude.shape != shape[-1:]:
        raise ValueError(
            f"{module}: lora_magnitude_vector {magnitude.shape} does not fit a matrix of {shape[-1]} "
            "outputs; is the adapter for another model?"
        )
    if not np.isfinite(np.asarray(magnitude, np.float32)).all():
        raise ValueError(f"{module}: lora_magnitude_vector holds NaN or infinite numbers")
    return np.asarray(magnitude, np.float32)

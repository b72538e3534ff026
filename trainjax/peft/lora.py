"""LoRA: a frozen matrix plus a trained product of two thin ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from trainjax import tree
from trainjax.ops.head import Tied
from trainjax.ops.matmul import dense, matmul, rows, through
from trainjax.ops.matmul import low_rank as low_rank_product
from trainjax.peft import _low_rank as low_rank
from trainjax.peft._ends import EMBEDDING, parted, plain, with_head
from trainjax.peft._low_rank import LowRank
from trainjax.peft._matrices import (
    ALL_LINEAR,
    Parts,
    drawn,
    dropout_keys,
    dropped,
    grouped,
    merged,
    replaced,
)
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree, static


@pytree
class Lora(Weight):
    """`x @ w + dropout(x) @ a @ b * scale`: a matrix with a low-rank update, kept apart.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        a, b: the update's factors, with the same leading axes.
        scale: one number for each matrix of the stack.
        key: turns dropout on; one key for each matrix of the stack. None in evaluation.
        dropout: probability that an input of the update (not of `w`) is zeroed.
    """

    w: Any
    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack rank out"]
    scale: Float[Array, "*stack"]
    key: Key[Array, "*stack"] | None = None
    dropout: float = static(0.0)

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        b = (self.b * self.scale[..., None, None]).astype(x.dtype)
        dropped_x = dropped(x, self.key, self.dropout)
        return matmul(x, self.w) + low_rank_product(dropped_x, self.a.astype(x.dtype), b)

    def rows(self, take: Callable[[Array], Array]) -> Array:
        """`take(w) + take(a) @ b * scale`, without dropout: of an embedding, PEFT 0.21 `Embedding`."""
        taken, thin = rows(take, self.w), take(self.a)
        update = thin.reshape(-1, thin.shape[-1]) @ (self.b * self.scale).astype(thin.dtype)
        return taken + update.reshape(taken.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`w + a b scale`, in float32."""
        return dense(self.w) + self.a @ (self.b * self.scale[..., None, None])

    def through(self, product: Callable[[Array, Array], Array], x: Array) -> Array:
        """`product(x, w) + product(dropout(x), a) @ b * scale`: of a convolution, one to `rank` channels.

        Agrees with PEFT 0.21 `Conv2d` for convolutions of one group without dilation, which PEFT leaves
        out of the update.
        """
        thin = product(dropped(x, self.key, self.dropout), self.a.astype(x.dtype))
        b = (self.b * self.scale[..., None, None]).astype(x.dtype)
        update = matmul(thin.reshape(-1, thin.shape[-1]), b)
        return through(product, x, self.w) + update.reshape(*thin.shape[:-1], b.shape[-1])


def lora(
    rank: int = 16,
    alpha: float = 32.0,
    target: str = ALL_LINEAR,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> Peft:
    """`W + (alpha / rank) A B` on the matrices whose name matches `target`.

    `A` starts uniform in `±1/sqrt(in)` (kaiming with a = sqrt 5, as in PEFT) and `B` at zero, so the
    adapter starts as the identity. Both train in float32; the base stays as it was loaded.

    Args:
        rank: inner size of the update.
        alpha: numerator of its scale.
        target: regex over parameter names such as `layers/attention/query/kernel`, and those of both ends,
            `embed/embedding` and `head/kernel`. Where these two are tied, an update of one is not one of
            the other, as in PEFT, and a merged model has a head of its own.
        rank_pattern, alpha_pattern: other values for the matrices whose name, with the layer's
            number in it (`layers/3/mlp/up/kernel`), matches a regex; the first match wins.
        rslora: scale by `alpha / sqrt(rank)` instead, which keeps the update's size when the rank
            grows (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: on the update's input, in training only.

    Raises:
        ValueError: rank below 1 or above a matrix's sides; dropout outside [0, 1); a regex that
            matches nothing.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3. Agrees with PEFT 0.21 `LoraLayer`.
    """
    return _method(
        low_rank.low_rank(rank, alpha, target, rank_pattern, alpha_pattern, rslora, dropout)
    )


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: LowRank) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config), bind(_attach, config), bind(_merge, config), bind(_export, config)
    )


def _init(config: LowRank, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> Parts:
        if name == EMBEDDING:
            return _of_embedding(int(config.ranks(name, ())), key, w)
        return low_rank.factors(config, key, name, w)

    return drawn(key, config.targets(with_head(params), [EMBEDDING]), draw, low_rank.AXES)


def _of_embedding(rank: int, key: PRNGKeyArray, w: Any) -> Parts:
    """`A` at zero and `B` normal, as in PEFT: a row of `A` moves with its own token's gradient alone."""
    entries, width = w.shape
    b = jax.random.normal(key, (rank, width), jnp.float32)
    return {"a": jnp.zeros((entries, rank), jnp.float32), "b": b}


def _attach(
    config: LowRank, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Lora:
        stack = w.shape[:-2]
        keys = dropout_keys(key, config.dropout, name, stack)
        return Lora(w, parts["a"], parts["b"], config.scales(name, stack), keys, config.dropout)

    return replaced(parted(params, grouped(adapter)), adapter, leaf)


def _merge(config: LowRank, params: Params, adapter: Params) -> Params:
    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Array:
        total = Lora(w, parts["a"], parts["b"], config.scales(name, w.shape[:-2]))
        return merged(total, w.embedding if isinstance(w, Tied) else w)

    return plain(replaced(parted(params, grouped(adapter)), adapter, leaf))


def _export(config: LowRank, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return low_rank.export(config, adapter, modules)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of plain LoRA.

    Args:
        files: settings, and tensors by `<module>.lora_A.weight`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/up/kernel`).
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that changes the function and is not supported, a tensor of a module
            that the model does not have, a shape that does not fit; each by name.
    """
    fields = files.fields
    others = fields.get("use_dora") or str(fields.get("init_lora_weights")).startswith("pissa")
    if fields.get("peft_type") != "LORA" or others:
        return None
    config, adapter, unknown = low_rank.read(files, modules, with_head(params))
    low_rank.refuse_unknown(unknown)
    return _method(config), tree.unflatten(adapter)

"""Prefix tuning and P-tuning v2: keys and values of virtual tokens in every layer are all that trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.peft import _virtual as virtual
from trainjax.peft._matrices import drawn
from trainjax.types import Params, Peft, PeftFiles


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """The settings; see `prefix`."""

    num_virtual_tokens: int
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None


def prefix(
    num_virtual_tokens: int = 20,
    *,
    prefix_projection: bool = False,
    encoder_hidden_size: int | None = None,
) -> Peft:
    """`softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]` in every layer, with trained `P_k` and `P_v`.

    Every token of every example sees them; they are not rotated, and the example begins at position
    `num_virtual_tokens`. They begin normal, so a model with them does not begin as the base, and no
    weights have their function: `merge` refuses.

    Args:
        num_virtual_tokens: keys and values a layer.
        prefix_projection: train a network that makes them, `W2 tanh(W1 e + b1) + b2` with a trained `e`
            a virtual token and a `W2` for the keys and for the values of each layer. Files hold what it
            makes, as PEFT's do, and are read back as those of a plain prefix.
        encoder_hidden_size: width of its hidden layer; by default that of a layer's keys.

    Raises:
        ValueError: no virtual tokens; a hidden layer without units, or one without the projection;
            params that have virtual tokens already.

    Source: Li & Liang 2021, arXiv:2101.00190, section 4; without the projection it is P-tuning v2, Liu
    et al. 2021, arXiv:2110.07602. Agrees with PEFT 0.21 `PrefixEncoder`.
    """
    count = virtual.checked_count(num_virtual_tokens)
    if encoder_hidden_size is not None and not prefix_projection:
        raise ValueError(
            f"encoder_hidden_size={encoder_hidden_size} is the width of a projection, and there is "
            "none; set prefix_projection"
        )
    return _method(_Prefix(count, prefix_projection, virtual.checked_size(encoder_hidden_size)))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Prefix) -> Peft:
    init = _init_projected if config.prefix_projection else _init
    return Peft(functools.partial(init, config), _attach, virtual.merge, _export)


def _init(config: _Prefix, key: PRNGKeyArray, params: Params) -> Params:
    def draw(key: PRNGKeyArray, name: str, w: Any) -> dict[str, Array]:
        *stack, _, width = w.shape
        return {"tokens": jax.random.normal(key, (*stack, config.num_virtual_tokens, width))}

    made = drawn(key, virtual.projections(params), draw, {"tokens": (None, "out")})
    return {"prefix": {name: parts["tokens"] for name, parts in made.items()}}


def _init_projected(config: _Prefix, key: PRNGKeyArray, params: Params) -> Params:
    matrices = virtual.projections(params)
    width = matrices["key"].shape[-1]
    hidden = config.encoder_hidden_size or width

    def first(key: PRNGKeyArray, name: str, table: Any) -> dict[str, Array]:
        keys = jax.random.split(key)
        layer = virtual.linear(keys[0], width, hidden)
        embedding = jax.random.normal(keys[1], (config.num_virtual_tokens, width))
        return {"embedding": embedding, **{f"hidden/{part}": x for part, x in layer.items()}}

    def second(key: PRNGKeyArray, name: str, w: Any) -> dict[str, Array]:
        *stack, _, width = w.shape
        return virtual.linear(key, hidden, width, tuple(stack))

    whole = {"embedding": (None, None), "hidden/kernel": (None, None), "hidden/bias": (None,)}
    common = drawn(key, {"prefix": virtual.table(params)}, first, whole)
    of_layers = drawn(key, matrices, second, {"kernel": (None, "out"), "bias": ("out",)})
    return {"prefix": {**common["prefix"], **of_layers}}


def _tokens(adapter: Params) -> dict[str, Float[Array, "*layers virtual width"]]:
    """The keys and the values of each layer, projected if they are to be."""
    parts = adapter["prefix"]
    if "embedding" not in parts:
        return parts
    x = jnp.tanh(virtual.applied(parts["hidden"], parts["embedding"]))
    return {name: virtual.applied(parts[name], x) for name in ("key", "value")}


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    return virtual.attached(params, "prefix", _tokens(adapter))


def _export(adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    """PEFT's row of a virtual token: of each layer its key, then its value."""
    made = _tokens(adapter)
    both = jnp.stack([made["key"], made["value"]], axis=1)  # [layers, 2, virtual, width]
    layers, _, count, width = both.shape
    tokens = both.transpose(2, 0, 1, 3).reshape(count, layers * 2 * width)
    # Without num_attention_heads, of which the adapter knows nothing: PEFT takes the base's kv heads.
    fields = {"token_dim": width, "num_layers": layers, "prefix_projection": False}
    return virtual.export("PREFIX_TUNING", tokens, fields)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of a prefix.

    Files of a prefix with a projection hold what it made, so the method is the plain one.

    Args:
        files: settings, and the tensor `prompt_embeddings`.
        modules: not read.
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that is not supported, a tensor that does not fit; each by name.
    """
    if files.fields.get("peft_type") != "PREFIX_TUNING":
        return None
    layers, _, width = virtual.projections(params)["key"].shape
    tokens = virtual.read(files, layers * 2 * width)
    keys, values = tokens.reshape(-1, layers, 2, width).transpose(2, 1, 0, 3)
    return prefix(len(tokens)), {"prefix": {"key": keys, "value": values}}

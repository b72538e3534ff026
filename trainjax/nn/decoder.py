"""A decoder-only transformer whose layers are one layer, scanned over stacked weights.

`Decoder` goes from tokens to hidden states. The output head is not part of the forward pass: losses
take hidden states and the head to `ops.vocab`, which never makes all the logits; `head(config, params)`
gives it to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from trainjax import axes
from trainjax.nn import remat as remats
from trainjax.nn.attention import Attention, LayerCache
from trainjax.nn.dense import Dense, Embed, weight
from trainjax.nn.mlp import SwiGlu
from trainjax.nn.virtual import KEPT, Virtual, num_virtual_tokens, virtual_tokens
from trainjax.ops.blocked import Prefix, Segments
from trainjax.ops.fold import Fold, fold
from trainjax.ops.head import Head, Tied
from trainjax.ops.matmul import products
from trainjax.ops.norm import rms_norm
from trainjax.ops.rope import Rope, Rotation, rotation
from trainjax.types import Params


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture: what `config.json` says, in one family's words for all families."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = dataclasses.field(default_factory=Rope)
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    window: int | None = None
    max_length: int = 2048


def check_heads(config: DecoderConfig, tensor: int) -> None:
    """Raises where a mesh's `tensor` axis does not divide the attention heads.

    Key heads may be fewer than its devices, which then share them.

    Raises:
        ValueError: with the sizes that do.
    """
    if config.num_heads % tensor:
        fits = [str(n) for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ValueError(
            f"the mesh's tensor={tensor} does not divide the model's {config.num_heads} attention heads; "
            f"use {', '.join(fits)}"
        )


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for generation.

    Attributes:
        keys, values: one slot a token, rotated already.
        filled: which slots hold a token (padding before a short prompt does not).
        length: slots used, virtual tokens' included, which are the first; the next token goes to slot
            `length`.
    """

    keys: Float[Array, "layers batch kv_heads slots dim"]
    values: Float[Array, "layers batch kv_heads slots dim"]
    filled: Bool[Array, "batch slots"]
    length: Int[Array, ""]


class Norm(nn.Module):
    """`rms_norm` with a learned scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        scale = weight(self, "scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x, scale, self.epsilon)


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normalised copy and added to the stream.

    Attributes:
        config: the architecture.
        mesh: the mesh that activations are sharded over, or None.
        parts: into how many parts rows are folded.
    """

    config: DecoderConfig
    mesh: Mesh | None = None
    parts: int = 1

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "batch seq embed"], tuple[Array, Array] | None],
        layer: Int[Array, ""],
        rotation: Rotation,
        segments: Segments | None,
        slots: tuple[Array, Array] | None,
        virtual: Virtual | None,
        positions: Int[Array, "batch seq"] | None,
    ) -> tuple[tuple[Array, tuple[Array, Array] | None], None]:
        c = self.config
        x, stacks = carry
        cache = None
        if stacks is not None and slots is not None:
            cache = LayerCache(*stacks, layer, *slots)
        attention = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.qkv_bias,
            c.output_bias,
            c.window,
            self.mesh,
            self.parts,
            name="attention",
        )
        out, cache = attention(
            Norm(c.rms_norm_eps, name="attention_norm")(x),
            rotation,
            segments,
            cache,
            None if virtual is None else Prefix(*virtual, positions),
        )
        x = checkpoint_name(x + out, "residual")
        mlp = SwiGlu(c.intermediate_size, c.mlp_bias, name="mlp")
        x = x + mlp(Norm(c.rms_norm_eps, name="mlp_norm")(x))
        x = _shard_rows(x, self.mesh, self.parts)
        return (x, None if cache is None else (cache.keys, cache.values)), None


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
        config: the architecture.
        dtype: what activations are computed in; norms, softmax and rotations are float32 inside.
        remat: what is kept for the backward pass, from `nn.remat`; None keeps all.
        mesh: the mesh that activations are sharded over, or None.
        fp8: whether the layers' products are of 8-bit floats (`ops.fp8`); thin ones of adapters, the head and
            quantised matrices are not.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: Callable[..., Any] | None = remats.full
    mesh: Mesh | None = None
    fp8: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"] | Float[Array, "batch seq embed"],
        positions: Int[Array, "batch seq"],
        segments: Segments | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """Final hidden states, normalised, ready for the head; and the cache with these tokens.

        Args:
            tokens: ids, or embeddings in their place.
            positions: place of each token in its own example. Virtual tokens of the params, see
                `nn.virtual`, come before it and are not counted.
            segments: which packed example each belongs to; None for one a row. With a cache, tokens
                of segment 0 are padding and leave no trace in it.
            cache: earlier tokens' keys and values, or None in training. It begins as `start_cache`.
        """
        c = self.config
        embed = Embed(c.vocab_size, c.hidden_size, self.dtype, self.mesh, name="embed")
        are_ids = jnp.issubdtype(tokens.dtype, jnp.integer)
        folded = Fold()
        if are_ids and cache is None:
            folded = fold(self.mesh, *tokens.shape)
        tokens, positions, segments = jax.tree.map(folded, (tokens, positions, segments))
        x = embed(tokens, folded.parts) if are_ids else tokens.astype(self.dtype)
        x = _shard_rows(x, self.mesh, folded.parts)
        if not c.tie_embeddings and self.is_initializing():
            Dense(c.vocab_size, name="head")(x)
        params = {} if self.is_initializing() else self.variables["params"]
        if before := num_virtual_tokens(params):
            positions = positions + before
        virtual = virtual_tokens(self.clone(parent=None), params) if cache is None else None
        tables = rotation(c.rope, positions, c.head_dim)
        stacks = slots = None
        if cache is not None:
            real = cast(Array | None, segments)  # prompts are not shared in generation
            cache, visible = _reserve(cache, positions, real, before, c.window)
            stacks, slots = (cache.keys, cache.values), (cache.length - tokens.shape[1], visible)
        block = Block
        if self.remat is not None and cache is None:
            block = nn.remat(Block, policy=self.remat, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "reports": 0, KEPT: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=c.num_layers,
        )(c, self.mesh, folded.parts, name="layers")
        places = None if virtual is None or c.window is None else positions
        with products(in_fp8=self.fp8):
            (x, stacks), _ = layers(
                (x, stacks), jnp.arange(c.num_layers), tables, segments, slots, virtual, places
            )
        x = folded.undo(Norm(c.rms_norm_eps, name="norm")(x))
        if cache is not None and stacks is not None:
            cache = cache._replace(keys=stacks[0], values=stacks[1])
        return x, cache


def head(config: DecoderConfig, params: Params) -> Head:
    """The output head of the params, `[embed, vocab]`, as `ops.vocab` takes it.

    In a model of tied embeddings it is the embedding, unless the params have a head of their own: an
    adapter may part the two.
    """
    if config.tie_embeddings and "head" not in params:
        return Tied(params["embed"]["embedding"])
    return params["head"]["kernel"]


def body(params: Params) -> Params:
    """The params that make hidden states: all but the output head, and the head that scores."""
    return {name: part for name, part in params.items() if name not in ("head", "score")}


def start_cache(module: Decoder, params: Params, batch: int, slots: int) -> Cache:
    """A cache with room for `slots` tokens a row, in which there are only the params' virtual tokens."""
    virtual = virtual_tokens(module, params)
    if virtual is None:
        return init_cache(module.config, batch, slots, module.dtype)
    before = virtual.keys.shape[2]
    cache = init_cache(module.config, batch, before + slots, module.dtype)

    def filled(stack: Array, first: Array) -> Array:
        return stack.at[:, :, :, :before].set(first[:, None].astype(stack.dtype))

    return Cache(
        filled(cache.keys, virtual.keys),
        filled(cache.values, virtual.values),
        cache.filled.at[:, :before].set(True),
        jnp.int32(before),
    )


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `slots` tokens a row."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    filled = jnp.zeros((batch, slots), bool)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), filled, jnp.zeros((), jnp.int32))


def _reserve(
    cache: Cache, positions: Array, segments: Array | None, before: int, window: int | None
):
    """The cache with the new tokens' slots taken, and which slots each of them sees.

    Args:
        cache: as it was.
        positions: places of the new tokens, virtual ones counted.
        segments: 0 for padding.
        before: how many virtual tokens there are, in the first slots.
        window: of the model.
    """
    slots = cache.filled.shape[1]
    batch, new = positions.shape
    real = jnp.ones((batch, new), bool) if segments is None else segments > 0
    filled = jax.lax.dynamic_update_slice(
        cache.filled, real, (jnp.zeros((), jnp.int32), cache.length)
    )
    own = cache.length + jnp.arange(new)[:, None]
    slot = jnp.arange(slots)[None, :]
    visible = slot <= own
    if window is not None:
        visible &= slot > own - window
    visible = visible[None]
    if window is not None and before:  # padding is between their slots and the text's
        visible = jnp.where(slot < before, positions[:, :, None] - slot < window, visible)
    visible = visible & filled[:, None, :]
    return cache._replace(filled=filled, length=cache.length + new), visible


def _shard_rows(x: Array, mesh: Mesh | None, parts: int) -> Array:
    """Says that rows are split over the data axes, so that the compiler need not guess.

    Not of a single row, which cannot be split: under `vmap` over examples it is the examples that are.
    """
    if mesh is None or x.shape[0] == 1:
        return x
    split = axes.rows(mesh) if parts == 1 else (*axes.rows(mesh), "sequence")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(split, None, None)))

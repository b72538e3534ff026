"""Grouped-query attention with rotary positions, for training and for generation with a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from trainjax.nn.dense import Dense, latest
from trainjax.nn.virtual import KEPT
from trainjax.ops.attention import attend
from trainjax.ops.blocked import Prefix, Segments, attend_cache
from trainjax.ops.rope import Rotation, rotate


class LayerCache(NamedTuple):
    """The whole model's cache as one layer sees it: every layer's slots, and which layer is its own.

    Attributes:
        keys, values: `[layers, batch, kv_heads, slots, dim]`. Carried through the scan over layers
            and updated in place; a slice a layer would be copied out and back at every token.
        layer: index of this layer.
        start: slot of the first new token.
        visible: which slots each new token sees.
    """

    keys: Float[Array, "layers batch kv_heads slots dim"]
    values: Float[Array, "layers batch kv_heads slots dim"]
    layer: Int[Array, ""]
    start: Int[Array, ""]
    visible: Bool[Array, "batch seq slots"]


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(d)) v` of `num_heads` query heads over `num_kv_heads` key heads.

    Attributes:
        num_heads, num_kv_heads, head_dim: the heads.
        qkv_bias, output_bias: which projections have a bias.
        window: sliding window in tokens, or None.
        mesh: mesh that activations are sharded over, or None.
        parts: into how many parts rows are folded.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    window: int | None = None
    mesh: Mesh | None = None
    parts: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        segments: Segments | None,
        cache: LayerCache | None,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        query = self._heads(x, self.num_heads, "query")
        key = self._heads(x, self.num_kv_heads, "key")
        value = self._heads(x, self.num_kv_heads, "value")
        query = checkpoint_name(rotate(query, rotation), "query")
        key = checkpoint_name(rotate(key, rotation), "key")
        value = checkpoint_name(value, "value")
        if self.is_mutable_collection(KEPT) and not self.is_initializing():
            for name, kept in (("keys", key), ("values", value)):
                self.sow(KEPT, name, kept, reduce_fn=latest, init_fn=lambda: None)
        if cache is None:
            out = attend(
                query,
                key,
                value,
                segments,
                prefix=prefix,
                window=self.window,
                mesh=self.mesh,
                parts=self.parts,
            )
        else:
            cache = _extend(cache, key, value)
            keys, values = (
                lax.dynamic_index_in_dim(stack, cache.layer, keepdims=False)
                for stack in (cache.keys, cache.values)
            )
            out = attend_cache(query, keys, values, cache.visible)
        out = out.reshape(*x.shape[:2], self.num_heads * self.head_dim)
        return Dense(x.shape[-1], self.output_bias, name="output")(out), cache

    def _heads(self, x: Array, heads: int, name: str) -> Float[Array, "batch seq heads dim"]:
        y = Dense(heads * self.head_dim, self.qkv_bias, name=name)(x)
        return y.reshape(*x.shape[:2], heads, self.head_dim)


def _extend(cache: LayerCache, key: Any, value: Any) -> LayerCache:
    """The cache with the new tokens' keys and values in their slots of this layer."""
    zero = jnp.zeros((), cache.start.dtype)
    at = (cache.layer.astype(zero.dtype), zero, zero, cache.start, zero)

    def write(stack, new):
        new = new.transpose(0, 2, 1, 3)[None].astype(stack.dtype)
        return lax.dynamic_update_slice(stack, new, at)

    return cache._replace(keys=write(cache.keys, key), values=write(cache.values, value))

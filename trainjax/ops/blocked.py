"""Attention in plain XLA: what a token may see, and blocks of queries against the keys that they see.

Training comes here through `ops.attention`; generation, against a key/value cache, by `attend_cache`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from trainjax.derivatives import own_gradient

Query = Float[Array, "batch seq heads dim"]
KeyValue = Float[Array, "batch seq kv_heads dim"]


class Branches(NamedTuple):
    """Segments of which several share a beginning: completions of one prompt, which is there once.

    Attributes:
        segments: which segment a token belongs to; it sees its own.
        prefixes: another segment, earlier in the row, that it sees too; 0 for none.
    """

    segments: Int[Array, "batch seq"]
    prefixes: Int[Array, "batch seq"]


Segments = Int[Array, "batch seq"] | Branches


class Prefix(NamedTuple):
    """Keys and values of virtual tokens, which come before every example of every row.

    Attributes:
        keys, values: seen by all tokens that the window lets see them. In float32 where they train:
            their gradients are sums over all rows.
        positions: place of each token in its own example, the virtual ones counted; read only where
            there is a window.
    """

    keys: Float[Array, "kv_heads virtual dim"]
    values: Float[Array, "kv_heads virtual dim"]
    positions: Int[Array, "batch seq"] | None = None


MASKED = -1e30  # finite, so that a row with nothing to see gives numbers nobody reads, not NaN


class _Blocks(NamedTuple):
    size: int
    window: int | None


def blocked(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    prefix: Prefix | None = None,
    window: int | None = None,
    block: int = 128,
) -> Query:
    """`attend` in plain XLA: blocks of queries, each against the keys that it may see.

    Keys after a block are never touched, which nearly halves the work, and no array is larger than
    `heads * block * seq`. Output and logsumexp are all that the gradient keeps besides the inputs.
    Query heads that share a key head are rows of one matrix product. The keys of a prefix are the first
    of every block.
    """
    seq = query.shape[1]
    size = min(seq, max(block, -(-seq // 16)))  # blocks are unrolled: 16 at most
    arrays = grouped(query, key.shape[2]), heads_first(key), heads_first(value)
    return ungrouped(_blocked(_Blocks(size, window), *arrays, segments, prefix))


def grouped(query: Query, kv_heads: int) -> Float[Array, "batch kv_heads group seq dim"]:
    """Query heads beside those that share their key head."""
    return rearrange(
        query, "batch seq (kv_heads group) dim -> batch kv_heads group seq dim", kv_heads=kv_heads
    )


def ungrouped(out: Float[Array, "batch kv_heads group seq dim"]) -> Query:
    """The inverse of `grouped`."""
    return rearrange(out, "batch kv_heads group seq dim -> batch seq (kv_heads group) dim")


def heads_first(x: KeyValue) -> Float[Array, "batch kv_heads seq dim"]:
    """A matrix for each row and head."""
    return rearrange(x, "batch seq kv_heads dim -> batch kv_heads seq dim")


@own_gradient(nondiff_argnums=(0,))
def _blocked(blocks: _Blocks, q, k, v, segments, prefix):
    return _blocked_fwd(blocks, q, k, v, segments, prefix)[0]


def _blocked_fwd(blocks: _Blocks, q, k, v, segments, prefix):
    outs, logsumexps = [], []
    for rows, seen in _ranges(blocks, q):
        ki, vi = _keys_and_values(prefix, k, v, seen)
        allowed = _allowed(segments, prefix, rows, seen, blocks.window)
        scores = masked_scores(q[..., rows, :], ki, allowed)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        out = per_kv_head(p.astype(v.dtype), vi, 1, 0) / total
        outs.append(split_rows(out.astype(q.dtype), q))
        logsumexps.append(split_rows(top + jnp.log(total), q))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    lse = checkpoint_name(jnp.concatenate(logsumexps, axis=3), "attention")
    return out, (q, k, v, segments, prefix, out, lse)


def _blocked_bwd(blocks: _Blocks, residuals, g):
    q, k, v, segments, prefix, out, lse = residuals
    f32 = jnp.float32
    delta = jnp.sum(g.astype(f32) * out.astype(f32), axis=-1, keepdims=True)
    dqs, dk, dv = [], jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    shared_k: Any = None if prefix is None else jnp.zeros(prefix.keys.shape, f32)
    shared_v = shared_k
    for rows, seen in _ranges(blocks, q):
        qi, gi = merge_rows(q[..., rows, :]), merge_rows(g[..., rows, :])
        ki, vi = _keys_and_values(prefix, k, v, seen)
        allowed = _allowed(segments, prefix, rows, seen, blocks.window)
        scores = masked_scores(q[..., rows, :], ki, allowed)
        p = jnp.exp(scores - merge_rows(lse[..., rows, :]))
        dp = per_kv_head(gi, vi, 1, 1)
        ds = p * (dp - merge_rows(delta[..., rows, :])) * q.shape[-1] ** -0.5
        p, ds = p.astype(g.dtype), ds.astype(q.dtype)
        dv, shared_v = _added(dv, shared_v, seen, per_kv_head(p, gi, 0, 0))
        dk, shared_k = _added(dk, shared_k, seen, per_kv_head(ds, qi, 0, 0))
        dqs.append(split_rows(per_kv_head(ds, ki, 1, 0), q))
    dq = jnp.concatenate(dqs, axis=3)
    dprefix = None
    if prefix is not None:
        dprefix = Prefix(shared_k.astype(prefix.keys.dtype), shared_v.astype(prefix.values.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dprefix


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _keys_and_values(prefix: Prefix | None, k, v, seen: slice):
    """Those that a block of queries may see: the prefix, the same for all rows, and the row's own."""
    own = k[:, :, seen], v[:, :, seen]
    if prefix is None:
        return own
    return tuple(
        jnp.concatenate(
            [jnp.broadcast_to(shared.astype(x.dtype), (x.shape[0], *shared.shape)), x], axis=2
        )
        for shared, x in zip((prefix.keys, prefix.values), own, strict=True)
    )


def _added(own, shared, seen: slice, new):
    """A block's gradients added to those of the row's own tokens and of the prefix, which rows share."""
    if shared is None:
        return own.at[:, :, seen].add(new), None
    count = shared.shape[1]
    return own.at[:, :, seen].add(new[:, :, count:]), shared + jnp.sum(new[:, :, :count], axis=0)


def _ranges(blocks: _Blocks, q) -> list[tuple[slice, slice]]:
    """Each block of queries with the keys that some query of it may see."""
    seq = q.shape[3]
    spans = [(start, min(start + blocks.size, seq)) for start in range(0, seq, blocks.size)]
    oldest = 0 if blocks.window is None else blocks.window - 1
    first = [0 if blocks.window is None else max(0, start - oldest) for start, _ in spans]
    return [(slice(a, b), slice(f, b)) for (a, b), f in zip(spans, first, strict=True)]


def _allowed(
    segments: Segments | None,
    prefix: Prefix | None,
    rows: slice,
    seen: slice,
    window: int | None,
) -> Bool[Array, "#batch 1 1 block keys"]:
    query_at = jnp.arange(rows.start, rows.stop)[:, None]
    key_at = jnp.arange(seen.start, seen.stop)[None, :]
    allowed = key_at <= query_at
    if window is not None:
        allowed &= key_at > query_at - window
    allowed = allowed[None]
    if segments is not None:
        allowed = allowed & related(segments, rows, seen)
    if prefix is not None:
        allowed = _joined(_virtual_allowed(prefix, rows, window), allowed)
    return allowed[:, None, None]


def _virtual_allowed(
    prefix: Prefix, rows: slice, window: int | None
) -> Bool[Array, "#batch block virtual"]:
    """Which virtual tokens a block of queries sees: they are the first of each example."""
    count = prefix.keys.shape[1]
    if window is None or prefix.positions is None:
        return jnp.ones((1, rows.stop - rows.start, count), bool)
    return prefix.positions[:, rows, None] - jnp.arange(count) < window


def _joined(
    first: Bool[Array, "#batch block virtual"], second: Bool[Array, "#batch block own"]
) -> Bool[Array, "#batch block keys"]:
    """Two masks side by side; where one is for all rows, repeated."""
    batch = max(first.shape[0], second.shape[0])
    parts = [jnp.broadcast_to(mask, (batch, *mask.shape[1:])) for mask in (first, second)]
    return jnp.concatenate(parts, axis=-1)


def related(segments: Segments, rows: slice, seen: slice) -> Bool[Array, "batch block keys"]:
    """Whether a token's segment lets it see another token, whatever their order."""
    ids, prefixes = segments if isinstance(segments, Branches) else (segments, None)
    keys = ids[:, None, seen]
    related = ids[:, rows, None] == keys
    if prefixes is None:
        return related
    return related | ((prefixes[:, rows, None] == keys) & (keys > 0))


def masked_scores(q: Array, k: Array, allowed: Array) -> Float[Array, "batch kv_heads rows keys"]:
    """Scaled, masked scores in float32; the grouped heads' rows merged."""
    scores = per_kv_head(merge_rows(q), k, 1, 1) * q.shape[-1] ** -0.5
    grouped = scores.reshape(*q.shape[:4], k.shape[2])
    return jnp.where(allowed, grouped, MASKED).reshape(scores.shape)


def per_kv_head(a: Array, b: Array, axis_a: int, axis_b: int) -> Float[Array, "batch kv_heads m n"]:
    """One matrix product per row and kv head, contracting the given axes, summed in float32."""
    contract = ((2 + axis_a,), (2 + axis_b,))
    return lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def merge_rows(x: Array) -> Array:
    """The queries of heads that share a key head as rows of one matrix."""
    return rearrange(x, "batch kv_heads group block n -> batch kv_heads (group block) n")


def split_rows(x: Array, like: Array) -> Array:
    """The inverse of `merge_rows`, for the group size of `like`."""
    return rearrange(
        x, "batch kv_heads (group block) n -> batch kv_heads group block n", group=like.shape[2]
    )


def attend_cache(
    query: Query,
    keys: Float[Array, "batch kv_heads slots dim"],
    values: Float[Array, "batch kv_heads slots dim"],
    visible: Bool[Array, "batch seq slots"],
) -> Query:
    """Attention of new tokens against a cache, softmax in float32.

    Args:
        query: the new tokens.
        keys, values: the cache, the new tokens' own entries included.
        visible: which slots each new token sees.

    Returns:
        An array like `query`.
    """
    q = grouped(query, keys.shape[1])
    scores = masked_scores(q, keys, visible[:, None, None])
    p = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = split_rows(per_kv_head(p, values, 1, 0), q)
    return ungrouped(out).astype(query.dtype)

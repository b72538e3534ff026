"""Attention through one door: the platform's fastest kernel for causal, packed, grouped heads.

`attend` is what layers call in training. It sends the work to splash attention on TPU, to cuDNN on
GPU, and to `blocked` on CPU and wherever those two cannot serve, which it says once.
`attend_cache` is the other door, for generation against a key/value cache.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from trainjax import axes
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


_MASKED = -1e30  # finite, so that a row with nothing to see gives numbers nobody reads, not NaN
_log = logging.getLogger(__name__)


def attend(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    prefix: Prefix | None = None,
    window: int | None = None,
    mesh: Mesh | None = None,
    parts: int = 1,
) -> Query:
    """`softmax(query key^T / sqrt(dim)) value`, causal, within a segment, softmax in float32.

    Args:
        query: `heads` is a multiple of `kv_heads`; consecutive query heads share a key head.
        key, value: one per kv head.
        segments: which packed example a token belongs to; it sees its own only, or as `Branches` say.
            None for one example a row: causality alone then keeps padding on the right out of sight.
        prefix: virtual tokens before each example, or None.
        window: see only this many latest tokens, itself included (Mistral's sliding window).
        mesh: the mesh that the arrays are sharded over, if any.
        parts: into how many parts rows are folded (`ops.fold`), each on a device of the mesh's `sequence`.

    Returns:
        An array like `query`.

    Raises:
        ValueError: a window with `Branches`, whose distances in the row are not those in the text.
    """
    if window is not None and isinstance(segments, Branches):
        raise ValueError(
            f"a sliding window of {window} tokens cannot see past other completions of the same "
            "prompt; lay each completion out with its own prompt"
        )
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if parts > 1:
        assert mesh is not None
        if platform != "cpu":
            _say_once("rows over several devices: using plain XLA attention")
        return gathered(query, key, value, segments, prefix=prefix, window=window, mesh=mesh)
    if platform == "tpu":
        if why_not := _splash_refuses(query, segments, prefix):
            _say_once(f"splash attention cannot serve {why_not}; using plain XLA attention")
        else:
            return splash(query, key, value, segments, window=window, mesh=mesh)
    if platform in ("gpu", "cuda", "rocm"):
        if why_not := _cudnn_refuses(query, platform, prefix):
            _say_once(f"cuDNN attention cannot serve {why_not}; using plain XLA attention")
        else:
            return cudnn(query, key, value, segments, window=window)
    if platform == "cpu":  # no batched product of bf16 there: one cast here, not many inside
        q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
        out = blocked(q, k, v, segments, prefix=prefix, window=window)
        return out.astype(query.dtype)
    return blocked(query, key, value, segments, prefix=prefix, window=window)


class _Blocks(NamedTuple):
    size: int
    window: int | None


def blocked(
    query: Float[Array, "batch queries heads dim"],
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    prefix: Prefix | None = None,
    window: int | None = None,
    at: Int[Array, " queries"] | None = None,
    block: int = 128,
) -> Float[Array, "batch queries heads dim"]:
    """`attend` in plain XLA: blocks of queries, each against the keys that it may see.

    Keys after a block are never touched, which nearly halves the work, and no array is larger than
    `heads * block * seq`. Output and logsumexp are all that the gradient keeps besides the inputs.
    Query heads that share a key head are rows of one matrix product. The keys of a prefix are the first
    of every block.

    Where queries are a part of the row, `at` is the place of each among the keys and segments, which are
    the whole row's; every block then goes over all keys.
    """
    seq = query.shape[1]
    size = min(seq, max(block, -(-seq // 16)))  # blocks are unrolled: 16 at most
    grouped = _grouped(query, key.shape[2]), _heads_first(key), _heads_first(value)
    return _ungrouped(_blocked(_Blocks(size, window), *grouped, segments, prefix, at))


def gathered(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    prefix: Prefix | None = None,
    window: int | None = None,
    mesh: Mesh,
) -> Query:
    """`attend` of rows folded over the devices of `sequence`: each gathers the keys and values of its rows.

    With few key heads beside query heads these are the smaller part: `2 kv_heads dim` numbers a token
    against the `heads dim` of the queries, which stay. Their gradients are summed where they came from.
    The last device has the most keys to see, and the others wait for it.

    Source: Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2 (context parallelism).
    """
    rows = (*axes.rows(mesh), "sequence")
    heads = "tensor" if key.shape[2] % axes.length(mesh, "tensor") == 0 else None
    array, ids, virtual = P(rows, None, heads, None), P(rows, None), P(heads, None, None)
    kind = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else query.dtype

    def local(query, key, value, segments, prefix):
        whole = functools.partial(lax.all_gather, axis_name="sequence", axis=1, tiled=True)
        key, value, segments = jax.tree.map(whole, (key, value, segments))
        own = query.shape[1]
        at = lax.axis_index("sequence") * own + jnp.arange(own)
        q, k, v = (x.astype(kind) for x in (query, key, value))
        virtual = None if prefix is None else Prefix(*prefix)
        out = blocked(q, k, v, segments, prefix=virtual, window=window, at=at)
        return out.astype(query.dtype)

    given, layouts = (None, None) if prefix is None else (tuple(prefix), (virtual, virtual, ids))
    specs = (array, array, array, ids, layouts)
    each = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=array, check_vma=False)
    return each(query, key, value, segments, given)


def _grouped(query: Query, kv_heads: int) -> Float[Array, "batch kv_heads group seq dim"]:
    """Query heads beside those that share their key head."""
    return rearrange(
        query, "batch seq (kv_heads group) dim -> batch kv_heads group seq dim", kv_heads=kv_heads
    )


def _ungrouped(out: Float[Array, "batch kv_heads group seq dim"]) -> Query:
    return rearrange(out, "batch kv_heads group seq dim -> batch seq (kv_heads group) dim")


def _heads_first(x: KeyValue) -> Float[Array, "batch kv_heads seq dim"]:
    return rearrange(x, "batch seq kv_heads dim -> batch kv_heads seq dim")


@own_gradient(nondiff_argnums=(0,))
def _blocked(blocks: _Blocks, q, k, v, segments, prefix, at):
    return _blocked_fwd(blocks, q, k, v, segments, prefix, at)[0]


def _blocked_fwd(blocks: _Blocks, q, k, v, segments, prefix, at):
    outs, logsumexps = [], []
    for rows, seen in _ranges(blocks, q, k, at):
        ki, vi = _keys_and_values(prefix, k, v, seen)
        allowed = _allowed(segments, prefix, rows, seen, blocks.window, at)
        scores = _scores(q[..., rows, :], ki, allowed)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        out = _per_kv_head(p.astype(v.dtype), vi, 1, 0) / total
        outs.append(_split_rows(out.astype(q.dtype), q))
        logsumexps.append(_split_rows(top + jnp.log(total), q))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    lse = checkpoint_name(jnp.concatenate(logsumexps, axis=3), "attention")
    return out, (q, k, v, segments, prefix, at, out, lse)


def _blocked_bwd(blocks: _Blocks, residuals, g):
    q, k, v, segments, prefix, at, out, lse = residuals
    f32 = jnp.float32
    delta = jnp.sum(g.astype(f32) * out.astype(f32), axis=-1, keepdims=True)
    dqs, dk, dv = [], jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    shared_k: Any = None if prefix is None else jnp.zeros(prefix.keys.shape, f32)
    shared_v = shared_k
    for rows, seen in _ranges(blocks, q, k, at):
        qi, gi = _merge_rows(q[..., rows, :]), _merge_rows(g[..., rows, :])
        ki, vi = _keys_and_values(prefix, k, v, seen)
        allowed = _allowed(segments, prefix, rows, seen, blocks.window, at)
        scores = _scores(q[..., rows, :], ki, allowed)
        p = jnp.exp(scores - _merge_rows(lse[..., rows, :]))
        dp = _per_kv_head(gi, vi, 1, 1)
        ds = p * (dp - _merge_rows(delta[..., rows, :])) * q.shape[-1] ** -0.5
        p, ds = p.astype(g.dtype), ds.astype(q.dtype)
        dv, shared_v = _added(dv, shared_v, seen, _per_kv_head(p, gi, 0, 0))
        dk, shared_k = _added(dk, shared_k, seen, _per_kv_head(ds, qi, 0, 0))
        dqs.append(_split_rows(_per_kv_head(ds, ki, 1, 0), q))
    dq = jnp.concatenate(dqs, axis=3)
    dprefix = None
    if prefix is not None:
        dprefix = Prefix(shared_k.astype(prefix.keys.dtype), shared_v.astype(prefix.values.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dprefix, None


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


def _ranges(blocks: _Blocks, q, k, at: Array | None) -> list[tuple[slice, slice]]:
    """Each block of queries with the keys that some query of it may see."""
    seq = q.shape[3]
    spans = [(start, min(start + blocks.size, seq)) for start in range(0, seq, blocks.size)]
    if at is not None:
        return [(slice(a, b), slice(0, k.shape[2])) for a, b in spans]
    oldest = 0 if blocks.window is None else blocks.window - 1
    first = [0 if blocks.window is None else max(0, start - oldest) for start, _ in spans]
    return [(slice(a, b), slice(f, b)) for (a, b), f in zip(spans, first, strict=True)]


def _allowed(
    segments: Segments | None,
    prefix: Prefix | None,
    rows: slice,
    seen: slice,
    window: int | None,
    at: Array | None,
) -> Bool[Array, "#batch 1 1 block keys"]:
    own = jnp.arange(rows.start, rows.stop) if at is None else at[rows]
    query_at = own[:, None]
    key_at = jnp.arange(seen.start, seen.stop)[None, :]
    allowed = key_at <= query_at
    if window is not None:
        allowed &= key_at > query_at - window
    allowed = allowed[None]
    if segments is not None:
        allowed = allowed & _related(segments, rows if at is None else own, seen)
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


def _related(
    segments: Segments, rows: slice | Array, seen: slice
) -> Bool[Array, "batch block keys"]:
    """Whether a token's segment lets it see another token, whatever their order."""
    ids, prefixes = segments if isinstance(segments, Branches) else (segments, None)
    keys = ids[:, None, seen]
    related = ids[:, rows, None] == keys
    if prefixes is None:
        return related
    return related | ((prefixes[:, rows, None] == keys) & (keys > 0))


def _scores(q, k, allowed) -> Float[Array, "batch kv_heads rows keys"]:
    """Scaled, masked scores in float32; the grouped heads' rows merged."""
    scores = _per_kv_head(_merge_rows(q), k, 1, 1) * q.shape[-1] ** -0.5
    grouped = scores.reshape(*q.shape[:4], k.shape[2])
    return jnp.where(allowed, grouped, _MASKED).reshape(scores.shape)


def _per_kv_head(a, b, axis_a: int, axis_b: int) -> Float[Array, "batch kv_heads m n"]:
    """One matrix product per row and kv head, contracting the given axes, summed in float32."""
    contract = ((2 + axis_a,), (2 + axis_b,))
    return lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _merge_rows(x):
    return rearrange(x, "batch kv_heads group block n -> batch kv_heads (group block) n")


def _split_rows(x, like):
    """The inverse of `_merge_rows`, for the group size of `like`."""
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
    q = _grouped(query, keys.shape[1])
    scores = _scores(q, keys, visible[:, None, None])
    p = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = _split_rows(_per_kv_head(p, values, 1, 0), q)
    return _ungrouped(out).astype(query.dtype)


def cudnn(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    window: int | None = None,
) -> Query:
    """`attend` by cuDNN's fused kernel. Packed rows hand it a mask, which it reads as a bias."""
    whole = slice(None)
    mask = None if segments is None else _related(segments, whole, whole)[:, None]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _cudnn_refuses(query: Query, platform: str, prefix: Prefix | None) -> str:
    if platform == "rocm":
        return "ROCm"
    if prefix is not None:
        return "virtual tokens"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype} (bfloat16 and float16 only)"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"head_dim={query.shape[-1]} (a multiple of 8 up to 256)"
    return ""


def splash(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None = None,
    *,
    window: int | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Query:
    """`attend` by the Pallas splash kernel, which skips masked blocks; one call a row and kv head.

    A Mosaic kernel cannot be partitioned by the compiler, so under a mesh each device runs it on its
    own rows and heads by `shard_map`.
    """
    if segments is None:
        segments = jnp.ones(query.shape[:2], jnp.int32)
    local = functools.partial(_splash_local, window=window, interpret=interpret)
    if mesh is None:
        return local(query, key, value, segments)
    rows = axes.rows(mesh)
    heads = "tensor" if "tensor" in mesh.axis_names else None
    array, ids = P(rows, None, heads, None), P(rows, None)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(array, array, array, ids), out_specs=array, check_vma=False
    )
    return sharded(query, key, value, segments)


def _splash_local(query, key, value, segments, *, window: int | None, interpret: bool) -> Query:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, seq, heads, dim = query.shape
    kv_heads = key.shape[2]
    q, k, v = _grouped(query, kv_heads), _heads_first(key), _heads_first(value)
    causal = masks.CausalMask((seq, seq))
    mask = causal if window is None else causal & masks.LocalMask((seq, seq), (window - 1, 0), 0)
    kernel = kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * (heads // kv_heads)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    one_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    ids = kernels.SegmentIds(segments, segments)
    return _ungrouped(jax.vmap(one_row)(q * dim**-0.5, k, v, ids))


def _splash_refuses(query: Query, segments: Segments | None, prefix: Prefix | None) -> str:
    if prefix is not None:
        return "virtual tokens"
    if isinstance(segments, Branches):
        return "completions that share a prompt"
    _, seq, _, dim = query.shape
    if seq % 128:
        return f"a length of {seq} (a multiple of 128)"
    if dim % 64:
        return f"head_dim={dim} (a multiple of 64)"
    return ""


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)

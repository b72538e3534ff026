"""Attention through one door: the platform's fastest kernel for causal, packed, grouped heads.

`attend` is what layers call in training. It sends the work to splash attention on TPU, to cuDNN on
GPU, and to `ops.blocked`, or for long rows `ops.tiled`, on CPU and wherever those two cannot serve, which it
says once.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from trainjax import axes
from trainjax.ops.blocked import (
    Branches,
    KeyValue,
    Prefix,
    Query,
    Segments,
    blocked,
    grouped,
    heads_first,
    related,
    ungrouped,
)
from trainjax.ops.tiled import tiled

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
        out = _plain(q, k, v, segments, prefix=prefix, window=window, platform=platform)
        return out.astype(query.dtype)
    return _plain(query, key, value, segments, prefix=prefix, window=window, platform=platform)


_LONG = 1024  # tokens; of longer rows the scores of a block with all keys are larger than a CPU's caches


def _plain(
    query: Query,
    key: KeyValue,
    value: KeyValue,
    segments: Segments | None,
    *,
    prefix: Prefix | None,
    window: int | None,
    platform: str,
) -> Query:
    """`attend` in plain XLA."""
    seq = query.shape[1]
    if seq <= _LONG:
        return blocked(query, key, value, segments, prefix=prefix, window=window)
    place, tile = jnp.arange(seq), _tile(platform)
    return tiled(query, key, value, place, segments, prefix=prefix, window=window, tile=tile)


def _tile(platform: str) -> tuple[int, int]:
    """Queries and keys of one product: what a CPU's caches hold, or what fills an accelerator."""
    return (256, 512) if platform == "cpu" else (1024, 1024)


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
    against the `heads dim` of the queries. Their gradients are summed where they came from.

    Keys after a query are passed over (`ops.tiled`), so the last part of a row has the most to do. Every
    device therefore exchanges the second half of its queries with the device as far from the other end, and
    their outputs back: with halves `i` and `2 parts - 1 - i` of a row all have the same to do. They have it
    anyway under a window within a part.

    Source: Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2 (context parallelism).
    """
    parts = axes.length(mesh, "sequence")
    rows = (*axes.rows(mesh), "sequence")
    heads = "tensor" if key.shape[2] % axes.length(mesh, "tensor") == 0 else None
    array, ids, virtual = P(rows, None, heads, None), P(rows, None), P(heads, None, None)
    platform = mesh.devices.flat[0].platform
    kind = jnp.float32 if platform == "cpu" else query.dtype

    def local(query, key, value, segments, prefix):
        whole = functools.partial(lax.all_gather, axis_name="sequence", axis=1, tiled=True)
        exchanged = functools.partial(jax.tree.map, functools.partial(_exchanged, parts=parts))
        key, value, segments = jax.tree.map(whole, (key, value, segments))
        own, part = query.shape[1], lax.axis_index("sequence")
        at, (of_block, of_tile) = part * own + jnp.arange(own), _tile(platform)
        uneven = own > 1 and (window is None or window > own)
        if uneven:
            query, prefix = exchanged(query), prefix and (*prefix[:2], exchanged(prefix[2]))
            at = at.at[own // 2 :].add((parts - 1 - 2 * part) * own)
            of_block = min(of_block, own // 2)
        q, k, v = (x.astype(kind) for x in (query, key, value))
        virtual, tile = prefix and Prefix(*prefix), (of_block, of_tile)
        out = tiled(q, k, v, at, segments, prefix=virtual, window=window, tile=tile)
        out = out.astype(query.dtype)
        return exchanged(out) if uneven else out

    given, layouts = (None, None) if prefix is None else (tuple(prefix), (virtual, virtual, ids))
    specs = (array, array, array, ids, layouts)
    each = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=array, check_vma=False)
    return each(query, key, value, segments, given)


def _exchanged(
    x: Shaped[Array, "batch seq *rest"], *, parts: int
) -> Shaped[Array, "batch seq *rest"]:
    """The mirror device's second half of the tokens in the place of one's own; twice is as before."""
    half = x.shape[1] // 2
    pairs = [(part, parts - 1 - part) for part in range(parts)]
    return jnp.concatenate([x[:, :half], lax.ppermute(x[:, half:], "sequence", pairs)], axis=1)


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
    mask = None if segments is None else related(segments, whole, whole)[:, None]
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
    q, k, v = grouped(query, kv_heads), heads_first(key), heads_first(value)
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
    return ungrouped(jax.vmap(one_row)(q * dim**-0.5, k, v, ids))


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

"""Log-probabilities over the vocabulary from hidden states, without ever holding all the logits.

The logits of a batch, `[batch, seq, vocab]`, are the largest array of a naive training step: 8 rows of
512 tokens and a vocabulary of 49152 take 0.8 GB in float32, several times over. Here tokens go through
the head in chunks, and the vocabulary in blocks with a running maximum, as attention goes over keys.

Two facts make it cheap. A token whose log-probability nobody asks for (a prompt, padding) is never
sent through the head: those asked for are gathered first, and the number of chunks is decided at run
time. And a token's log-probability depends on that token's hidden state alone, so the forward pass can
make the Jacobian, one vector a token, which is all that the backward pass needs if the head is frozen.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from trainjax.derivatives import is_any_order, own_gradient
from trainjax.ops.head import (
    Head,
    Tied,
    add_slice,
    block_of,
    gradient,
    is_plain,
    joined,
    over_blocks,
    pull_back,
    scores_and_pullback,
    scores_of,
    target_rows,
    zero_gradient,
)
from trainjax.types import NO_EXTRAS, Extras, TokenStats


def token_stats(
    hidden: Float[Array, "batch seq embed"],
    head: Head,
    targets: Int[Array, "batch seq"],
    where: Bool[Array, "batch seq"],
    *,
    chunk: int = 256,
    vocab_block: int | None = 2048,
    groups: int = 1,
    extras: Extras = NO_EXTRAS,
) -> TokenStats:
    """`log softmax(hidden @ head)` at the targets, in float32, in `O(chunk * vocab_block)` memory.

    Args:
        hidden: states that predict the targets (already shifted: `hidden[:, t]` predicts
            `targets[:, t]`).
        head: `[embed, vocab]`, an array or any `Weight`; `Tied(embedding)` for tied embeddings.
        targets: token ids.
        where: which tokens to compute; the others cost nothing and come out as 0.
        chunk: tokens that go through the head at once.
        vocab_block: vocabulary entries at once, None for all (where the head is sharded over the
            vocabulary, or is a `Weight` that cannot be sliced).
        groups: the number of shards of the batch axis, so that gathering tokens stays within a
            device. It divides the batch.
        extras: further statistics. The entropy's gradient takes another product with the head.

    Returns:
        `TokenStats` of `[batch, seq]` arrays, with None for extras that were not asked for.
    """
    batch, seq, embed = hidden.shape
    tokens = batch * seq // groups
    chunk = min(chunk, tokens)
    if not is_plain(head):
        vocab_block = None
    grouped = functools.partial(jnp.reshape, shape=(groups, tokens))
    order = jnp.argsort(~grouped(where), axis=1, stable=True)
    num_chunks = -(-jnp.max(jnp.sum(grouped(where), axis=1)) // chunk)
    padding = ((0, 0), (0, -tokens % chunk))
    # The last chunk is filled up with tokens nobody asked for. They count with weight zero, which a
    # state that is not finite would survive: 0 * nan is nan.
    asked = jnp.where(where[..., None], hidden, jnp.zeros((), hidden.dtype))
    x = _take(asked.reshape(groups, tokens, embed), jnp.pad(order, padding))
    t = jnp.take_along_axis(grouped(targets), order, axis=1)
    static = _Static(chunk, vocab_block, extras)
    stats = _chunked(static, x, head, jnp.pad(t, padding), num_chunks)
    inverse = jnp.argsort(order, axis=1)

    def back(stat: Array) -> Array:
        stat = jnp.take_along_axis(stat[:, :tokens], inverse, axis=1)
        return jnp.where(where, stat.reshape(batch, seq), 0.0)

    stats = jax.tree.map(back, stats)
    return stats._replace(mean_logit=_mean_logit(asked, head)) if extras.mean_logit else stats


class _Static(NamedTuple):
    chunk: int
    vocab_block: int | None
    extras: Extras


def _take(x: Float[Array, "groups tokens embed"], order: Int[Array, "groups n"]) -> Array:
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _mean_logit(x: Float[Array, "batch seq embed"], head: Head) -> Float[Array, "batch seq"]:
    """The mean of each state's logits: linear, so a product with the head's mean row and no more.

    (Under dropout a `Lora` head draws here once more: the same in expectation.)
    """
    if is_plain(head):
        matrix, axis = (head.embedding, 0) if isinstance(head, Tied) else (head, 1)
        row = jnp.mean(matrix, axis, dtype=jnp.float32)
    else:
        ones = jnp.ones((1, head.shape[-1]), x.dtype)
        row = pull_back(ones, head, jnp.zeros((1, x.shape[-1]), x.dtype))[0] / head.shape[-1]
    return x.astype(jnp.float32) @ row


@own_gradient(nondiff_argnums=(0,))
def _chunked(static: _Static, x, head, targets, num_chunks):
    if is_any_order():  # every chunk, so that their number is known
        num_chunks = x.shape[1] // static.chunk
    return _forward(static, x, head, targets, num_chunks, with_rows=False)[0]


def _chunked_fwd(static: _Static, x, head, targets, num_chunks):
    trained, frozen = _primals(head, perturbed=True), _primals(head, perturbed=False)
    is_frozen = not jax.tree.leaves(trained)
    args = x.value, joined(trained, frozen), targets.value, num_chunks.value
    stats, rows = _forward(static, *args, with_rows=is_frozen)
    return stats, (x.value, trained, frozen, targets.value, num_chunks.value, stats, rows)


def _chunked_bwd(static: _Static, residuals, cotangents: TokenStats):
    x, trained, frozen, targets, num_chunks, stats, rows = residuals
    g_logprobs, g_lse = (
        jnp.zeros_like(stats.logsumexp) if isinstance(g, SymbolicZero) else g
        for g in cotangents[:2]
    )
    g_entropy = None if isinstance(cotangents.entropy, SymbolicZero) else cotangents.entropy
    if rows is None:
        needed = x, trained, frozen, targets, num_chunks, stats, g_logprobs, g_lse, g_entropy
        return *_backward(static, *needed), None, None
    # Frozen head. With E[row] the mean of the head's rows under the model's distribution:
    # d logp(target) / dx = row(target) - E[row],  d logsumexp / dx = E[row].
    here = target_rows(frozen, targets, x, static.chunk)
    dx = g_logprobs[..., None] * here + (g_lse - g_logprobs)[..., None] * rows.mean
    if g_entropy is not None:
        dx += g_entropy[..., None] * rows.entropy
    return dx.astype(x.dtype), None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


def _primals(head: Head, *, perturbed: bool) -> Head:
    """The head with those of its leaves that are differentiated, or those that are not; else None."""
    return jax.tree.map(
        lambda leaf: leaf.value if leaf.perturbed == perturbed else None,
        head,
        is_leaf=lambda node: isinstance(node, CustomVJPPrimal),
    )


class _Rows(NamedTuple):
    """Jacobians with respect to a token's state: of its logsumexp, and of its entropy if asked for."""

    mean: Array
    entropy: Array | None


class _Sums(NamedTuple):
    """What is known of some tokens after a part of the vocabulary. With z the logits so far:

    `top = max z`, `total = sum exp(z - top)`, `moment = sum exp(z - top) (z - top)`,
    `square = sum exp(z - top)^2`; `mean` and `tilt` are the sums of `total` and `moment` with each
    term times its row of the head.
    """

    top: Array
    total: Array
    target_logit: Array
    mean: Array | None
    moment: Array | None
    tilt: Array | None
    square: Array | None


def _forward(static: _Static, x, head, targets, num_chunks, *, with_rows: bool):
    """The statistics of every token, and the rows that a gradient through a frozen head needs."""
    groups, tokens, embed = x.shape
    rows = groups * static.chunk
    extras = static.extras

    def one_chunk(i, out):
        xc = _chunk_of(x, i, static.chunk).reshape(rows, embed)
        tc = _chunk_of(targets, i, static.chunk).reshape(rows)

        def one_block(sums: _Sums, start, size):
            return _with_block(sums, xc, tc - start, block_of(head, start, size))

        zeros = jnp.zeros(rows, jnp.float32)
        of_rows = jnp.zeros((rows, embed), jnp.float32) if with_rows else None
        sums = _Sums(
            top=jnp.full(rows, -jnp.inf, jnp.float32),
            total=zeros,
            target_logit=zeros,
            mean=of_rows,
            moment=zeros if extras.entropy else None,
            tilt=of_rows if extras.entropy else None,
            square=zeros if extras.collision else None,
        )
        new = _statistics(over_blocks(one_block, sums, head, static.vocab_block))
        return jax.tree.map(
            lambda old, part: lax.dynamic_update_slice_in_dim(
                old, part.reshape(groups, static.chunk, *old.shape[2:]), i * static.chunk, axis=1
            ),
            out,
            new,
        )

    scalars = jnp.zeros((groups, tokens), jnp.float32)
    entropy, collision = (
        scalars if asked else None for asked in (extras.entropy, extras.collision)
    )
    stats = TokenStats(scalars, scalars, scalars, entropy, None, collision)
    jacobians = None
    if with_rows:
        vectors = jnp.zeros((groups, tokens, embed), jnp.float32)
        jacobians = _Rows(vectors, vectors if extras.entropy else None)
    one_chunk = jax.checkpoint(one_chunk) if is_any_order() else one_chunk
    return lax.fori_loop(0, num_chunks, one_chunk, (stats, jacobians))


def _with_block(sums: _Sums, x: Array, at: Array, block: Head) -> _Sums:
    """The sums with one more block of the vocabulary; `at` is where in it the targets are."""
    scores = scores_of(x, block)
    size = scores.shape[1]
    new_top = jnp.maximum(sums.top, scores.max(axis=1))
    shift, p = jnp.exp(sums.top - new_top), jnp.exp(scores - new_top[:, None])
    here = jnp.take_along_axis(scores, jnp.clip(at, 0, size - 1)[:, None], axis=1)[:, 0]
    target_logit = jnp.where((at >= 0) & (at < size), here, sums.target_logit)
    mean, moment, tilt, square = sums.mean, sums.moment, sums.tilt, sums.square
    if moment is not None:
        # Terms e^(z - top) (z - top) move with the top twice; before the first block there are none.
        lift = jnp.where(jnp.isfinite(sums.top), sums.top - new_top, 0.0)
        surprise = p * (scores - new_top[:, None])
        moment = (moment + lift * sums.total) * shift + surprise.sum(axis=1)
        if tilt is not None and mean is not None:
            tilt = (tilt + lift[:, None] * mean) * shift[:, None]
            tilt += pull_back(surprise.astype(x.dtype), block, x)
    if mean is not None:
        mean = mean * shift[:, None] + pull_back(p.astype(x.dtype), block, x)
    if square is not None:
        square = square * shift**2 + (p**2).sum(axis=1)
    total = sums.total * shift + p.sum(axis=1)
    return _Sums(new_top, total, target_logit, mean, moment, tilt, square)


def _statistics(sums: _Sums) -> tuple[TokenStats, _Rows | None]:
    """From the sums over the whole vocabulary.

    With t = z - top: `H = log(total) - E[t]`, and `dH/dx = -Cov(t, row) = E[t] E[row] - E[t row]`.
    """
    log_total = jnp.log(sums.total)
    lse = sums.top + log_total
    correct = (sums.target_logit >= sums.top).astype(jnp.float32)
    stats = TokenStats(sums.target_logit - lse, lse, correct)
    if sums.square is not None:
        stats = stats._replace(collision=jnp.log(sums.square) - 2.0 * log_total)
    mean = None if sums.mean is None else sums.mean / sums.total[:, None]
    if sums.moment is None:
        return stats, None if mean is None else _Rows(mean, None)
    moment = sums.moment / sums.total
    stats = stats._replace(entropy=log_total - moment)
    if mean is None or sums.tilt is None:
        return stats, None
    return stats, _Rows(mean, moment[:, None] * mean - sums.tilt / sums.total[:, None])


def _backward(
    static: _Static, x, trained, frozen, targets, num_chunks, stats, g_logprobs, g_lse, g_entropy
):
    """Gradients of hidden states and of the head's trained leaves; scores are computed once more."""
    groups, _, embed = x.shape
    rows = groups * static.chunk
    head = joined(trained, frozen)
    of_entropy = () if g_entropy is None else (stats.entropy, g_entropy)

    def one_chunk(i, grads):
        xc = _chunk_of(x, i, static.chunk).reshape(rows, embed)
        tc, lc, gp, gl, *more = (
            _chunk_of(a, i, static.chunk).reshape(rows)
            for a in (targets, stats.logsumexp, g_logprobs, g_lse, *of_entropy)
        )

        def one_block(carry, start, size):
            dxc, dhead = carry
            block = block_of(trained, start, size)
            scores, pull = scores_and_pullback(xc, block, frozen, groups)
            hit = (tc[:, None] - start) == jnp.arange(size)
            g = (gl - gp)[:, None] * jnp.exp(scores - lc[:, None]) + jnp.where(
                hit, gp[:, None], 0.0
            )
            if more:  # dH / dz_k = -p_k (log p_k + H)
                entropy, ge = more
                logp = scores - lc[:, None]
                g -= ge[:, None] * jnp.exp(logp) * (logp + entropy[:, None])
            more_x, more_head = pull(g)
            return dxc + more_x.astype(jnp.float32), add_slice(dhead, more_head, start)

        dx, dhead = grads
        zeros = jnp.zeros((rows, embed), jnp.float32)
        dxc, dhead = over_blocks(one_block, (zeros, dhead), head, static.vocab_block)
        dxc = dxc.reshape(groups, static.chunk, embed)
        return lax.dynamic_update_slice_in_dim(dx, dxc, i * static.chunk, axis=1), dhead

    start = jnp.zeros(x.shape, jnp.float32), zero_gradient(trained, groups)
    dx, dhead = lax.fori_loop(0, num_chunks, one_chunk, start)
    return dx.astype(x.dtype), gradient(dhead, trained)


def _chunk_of(a: Array, i: Array, chunk: int) -> Array:
    return lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1)

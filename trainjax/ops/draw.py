"""Tokens drawn from hidden states, without ever holding all the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax.ops.head import Head, block_of, is_plain, over_blocks, scores_of


def draw(
    key: PRNGKeyArray,
    hidden: Float[Array, "batch seq embed"],
    head: Head,
    *,
    vocab_block: int | None = 2048,
) -> Int[Array, "batch seq"]:
    """One token from `softmax(hidden @ head)` at every state, in `O(batch * seq * vocab_block)` memory.

    `argmax_k(logit_k + g_k)` with independent standard Gumbel `g_k` is a draw from the softmax of the
    logits. A maximum can be kept while the vocabulary goes by in blocks, where a normaliser would be
    known only at its end.

    Args:
        key: of the draw.
        hidden: states.
        head: `[embed, vocab]`, an array or any `Weight`; `Tied(embedding)` for tied embeddings.
        vocab_block: vocabulary entries at once, None for all (see `ops.vocab.token_stats`).

    Source: Maddison et al. 2014, arXiv:1411.0030.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    vocab_block = vocab_block if is_plain(head) else None

    def one_block(carry, start, size):
        top, drawn = carry
        noise = jax.random.gumbel(jax.random.fold_in(key, start), (x.shape[0], size))
        scores = scores_of(x, block_of(head, start, size)) + noise
        best = jnp.argmax(scores, axis=1).astype(jnp.int32)
        score = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        return jnp.maximum(top, score), jnp.where(score > top, best + start, drawn)

    nothing = jnp.full(x.shape[0], -jnp.inf, jnp.float32), jnp.zeros(x.shape[0], jnp.int32)
    return over_blocks(one_block, nothing, head, vocab_block)[1].reshape(hidden.shape[:-1])

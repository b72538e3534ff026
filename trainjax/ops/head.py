"""The output head, a matrix or any `Weight`, and the few products with it that log-probabilities need.

Products are kept in float32 where the head is a plain matrix, and only such a head can be cut into
blocks of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from trainjax.types import Weight, pytree

Head = Any  # Float[Array, "embed vocab"] | Weight


@pytree
class Tied(Weight):
    """The transpose of an embedding matrix, as an output head that is never transposed in memory.

    Attributes:
        embedding: `[vocab, embed]`.
    """

    embedding: Float[Array, "vocab embed"]

    def __rmatmul__(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows vocab"]:
        return lax.dot_general(x, self.embedding.astype(x.dtype), (((1,), (1,)), ((), ())))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.embedding.shape[::-1]

    def dense(self) -> Float[Array, "embed vocab"]:
        """The transpose, in memory."""
        return self.embedding.astype(jnp.float32).T


def logits(hidden: Float[Array, "*rows embed"], head: Head) -> Float[Array, "*rows vocab"]:
    """All the logits in float32, for a few positions: sampling, small checks."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = _few_scores(flat, head.embedding) if isinstance(head, Tied) else scores_of(flat, head)
    return scores.reshape(*hidden.shape[:-1], -1)


def _few_scores(
    x: Float[Array, "rows embed"], embedding: Float[Array, "vocab embed"]
) -> Float[Array, "rows vocab"]:
    """`x @ embedding.T` for a few rows, with the table on the left of the product.

    XLA's CPU backend packs the right operand anew each time; so packed are the rows and not the table:
    6.7 ms against 10.9 for 8 rows of SmolLM2. The barrier keeps it from turning the product round.
    """
    contract = (((1,), (1,)), ((), ()))
    scores = lax.dot_general(
        embedding.astype(x.dtype), x, contract, preferred_element_type=jnp.float32
    )
    return lax.optimization_barrier(scores).T


def over_blocks(f, carry, head: Head, size: int | None):
    """Folds `f(carry, start, size)` over the blocks of the vocabulary; the last may be shorter."""
    vocab = head.shape[-1]
    size = min(size or vocab, vocab)
    whole, rest = divmod(vocab, size)
    carry = lax.fori_loop(0, whole, lambda i, c: f(c, i * size, size), carry)
    return f(carry, whole * size, rest) if rest else carry


def block_of(head: Head, start: Array | int, size: int) -> Head:
    """The head of a part of the vocabulary; a `Weight` that is not `Tied` is never cut."""
    if isinstance(head, Tied):
        return Tied(_cut(head.embedding, start, size, axis=0))
    return _cut(head, start, size, axis=1) if isinstance(head, jax.Array) else head


def _cut(a: Array, start: Array | int, size: int, axis: int) -> Array:
    return a if size == a.shape[axis] else lax.dynamic_slice_in_dim(a, start, size, axis)


def add_slice(total: Head, part: Head, start: Array | int) -> Head:
    """The gradient of a head, or of its trained leaves, with that of a block of it added."""
    axis = 0 if isinstance(total, Tied) else 1

    def add(whole, piece):
        if piece.shape == whole.shape:
            return whole + piece
        new = _cut(whole, start, piece.shape[axis], axis) + piece
        return lax.dynamic_update_slice_in_dim(whole, new, start, axis)

    return jax.tree.map(add, total, part)


def scores_of(x: Float[Array, "rows embed"], block: Head) -> Float[Array, "rows vocab"]:
    """`x @ block`, accumulated and kept in float32 where the head is a plain matrix."""
    if isinstance(block, Tied | jax.Array):
        matrix, axis = (block.embedding, 1) if isinstance(block, Tied) else (block, 0)
        return lax.dot_general(
            x,
            matrix.astype(x.dtype),
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    return (x @ block).astype(jnp.float32)


def pull_back(g: Float[Array, "rows vocab"], block: Head, x: Float[Array, "rows embed"]) -> Array:
    """`g @ block.T` in float32, for any kind of head."""
    if isinstance(block, Tied | jax.Array):
        matrix, axis = (block.embedding, 0) if isinstance(block, Tied) else (block, 1)
        return lax.dot_general(
            g,
            matrix.astype(g.dtype),
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    _, pull = jax.vjp(lambda x: x @ block, x)
    return pull(g)[0].astype(jnp.float32)


def target_rows(head: Head, targets: Int[Array, "groups tokens"], x: Array, chunk: int) -> Array:
    """The head's row of every target, `[groups, tokens, embed]` in float32."""
    if isinstance(head, Tied):
        rows = head.embedding[targets]
    elif isinstance(head, jax.Array):
        rows = jnp.moveaxis(head[:, targets], 0, -1)
    else:  # a Weight need not know how to index itself: products with one-hot rows, by chunks
        like = jnp.zeros((chunk, x.shape[-1]), x.dtype)
        hot = lambda t: jax.nn.one_hot(t, head.shape[-1], dtype=x.dtype)  # noqa: E731
        rows = lax.map(lambda t: pull_back(hot(t), head, like), targets.reshape(-1, chunk))
    return rows.astype(jnp.float32).reshape(x.shape)

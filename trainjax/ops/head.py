"""The output head, a matrix or any `Weight`, and the few products with it that log-probabilities need.

Products are kept in float32 where the head is a plain matrix, and only such a head can be cut into
blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
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

    @property
    def sharding(self) -> Sharding:
        """How the head `[embed, vocab]` is laid out over devices: as the embedding, turned."""
        sharding = self.embedding.sharding
        if not isinstance(sharding, NamedSharding):
            return sharding
        rows, columns = (*sharding.spec, None, None)[:2]
        return NamedSharding(sharding.mesh, PartitionSpec(columns, rows))

    def dense(self) -> Float[Array, "embed vocab"]:
        """The transpose, in memory."""
        return self.embedding.astype(jnp.float32).T


class Tile(NamedTuple):
    """What goes through the head at once.

    Attributes:
        tokens: rows of the product.
        entries: its columns, of the vocabulary.
    """

    tokens: int
    entries: int


def tile(platform: str) -> Tile:
    """The part of `hidden @ head` that a platform computes best in one product.

    A CPU's caches hold a small one. An accelerator wants one that fills it: of 256 tokens by 2048 entries
    an H100 would have 16 blocks of 128 by 256 for its 132 processors, and a thousand such products to start
    in a row of 4096 tokens. (Worked out, not measured.)

    Args:
        platform: as `jax.default_backend()` says.
    """
    return Tile(256, 2048) if platform == "cpu" else Tile(1024, 16384)


def is_plain(head: Head) -> bool:
    """Whether the head is a matrix, its own or the embedding's, and no other `Weight`."""
    return isinstance(head, Tied | jax.Array)


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


def zero_gradient(trained: Head, groups: int) -> Head:
    """What a head's gradient is summed up in.

    Of a plain head in float32 and for each group of rows by itself, `[groups, *shape]`: groups are on
    devices of their own, which so add up over all chunks before they exchange anything.
    """
    if is_plain(trained):
        return jax.tree.map(lambda w: jnp.zeros((groups, *w.shape), jnp.float32), trained)
    return jax.tree.map(jnp.zeros_like, trained)


def gradient(total: Head, trained: Head) -> Head:
    """The head's gradient of what was summed up since `zero_gradient`."""
    if is_plain(trained):
        return jax.tree.map(lambda a, w: a.sum(axis=0).astype(w.dtype), total, trained)
    return total


def add_slice(total: Head, part: Head, start: Array | int) -> Head:
    """The sums of `zero_gradient` with those of a block of the vocabulary added."""
    axis = -2 if isinstance(total, Tied) else -1

    def add(whole, piece):
        if piece.shape == whole.shape:
            return whole + piece
        new = _cut(whole, start, piece.shape[axis], axis) + piece
        return lax.dynamic_update_slice_in_dim(whole, new, start, axis)

    return jax.tree.map(add, total, part)


def scores_of(x: Float[Array, "rows embed"], block: Head) -> Float[Array, "rows vocab"]:
    """`x @ block`, accumulated and kept in float32 where the head is a plain matrix."""
    if is_plain(block):
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
    if is_plain(block):
        matrix, axis = (block.embedding, 0) if isinstance(block, Tied) else (block, 1)
        return lax.dot_general(
            g,
            matrix.astype(g.dtype),
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    _, pull = jax.vjp(lambda x: x @ block, x)
    return pull(g)[0].astype(jnp.float32)


def scores_and_pullback(
    x: Float[Array, "rows embed"], trained: Head, frozen: Head, groups: int
) -> tuple[Float[Array, "rows vocab"], Callable[[Array], tuple[Array, Head]]]:
    """`scores_of`, and the function from their gradient to those of `x` and of the head.

    Args:
        x: rows, those of each group beside one another.
        trained: a block of the head, with its trained leaves alone.
        frozen: the head's other leaves.
        groups: of rows, whose gradients of a plain head stay apart; see `zero_gradient`.
    """
    if not is_plain(trained):
        return jax.vjp(lambda x, part: scores_of(x, joined(part, frozen)), x, trained)

    def pull(g: Array) -> tuple[Array, Head]:
        g = g.astype(x.dtype)
        xs, gs = (a.reshape(groups, -1, a.shape[-1]) for a in (x, g))
        sides = (gs, xs) if isinstance(trained, Tied) else (xs, gs)
        over_rows = (((1,), (1,)), ((0,), (0,)))
        piece = lax.dot_general(*sides, over_rows, preferred_element_type=jnp.float32)
        return pull_back(g, trained, x), jax.tree.map(lambda _: piece, trained)

    return scores_of(x, trained), pull


def joined(trained: Head, frozen: Head) -> Head:
    """The whole head from its two parts, each of which has None where the other has a leaf."""
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        trained,
        frozen,
        is_leaf=lambda node: node is None,
    )


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

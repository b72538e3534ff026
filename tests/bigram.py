"""Policies that need no model, from each token to the next, and that compile in no time.

One is a table of logits. The other goes through 16 numbers: it has matrices and a vector, of sizes
that devices divide, draws tokens as a model does, and computes in float32 whatever its params are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from trainjax.ops.vocab import TokenStats
from trainjax.types import pytree

VOCAB = 61
WIDE = 64


def _stats(logits, batch, where) -> TokenStats:
    """Of logits that are of each token, given the one before it."""
    targets = batch.get("targets", batch["tokens"])
    lse = jax.nn.logsumexp(logits, axis=-1)
    at = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (at >= logits.max(axis=-1)).astype(jnp.float32)
    where = jnp.ones(targets.shape, bool) if where is None else where
    return TokenStats(*(jnp.where(where, x, 0.0) for x in (at - lse, lse, correct)))


def _bigram(params, batch, key=None, where=None) -> TokenStats:
    return _stats(jnp.roll(params["table"][batch["tokens"]], 1, axis=1), batch, where)


policy = Partial(_bigram)


def params(seed: int = 0) -> dict[str, jax.Array]:
    table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB))
    return {"table": jnp.asarray(table, jnp.float32)}


@pytree
class Narrow:
    """The policy through 16 numbers."""

    def _logits(self, params, batch):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        embedded = params["embed"]["embedding"][batch["tokens"]]
        hidden = jnp.tanh(embedded + params["hidden"]["bias"])
        return jnp.roll(hidden @ params["head"]["kernel"], 1, axis=1)

    def __call__(self, params, batch, key=None, where=None, extras=None) -> TokenStats:
        return _stats(self._logits(params, batch), batch, where)

    def draw(self, params, batch, key):
        drawn = jax.random.categorical(key, self._logits(params, batch)).astype(jnp.int32)
        return drawn.at[:, 0].set(batch["tokens"][:, 0])


LAYOUT = {
    "embed": {"embedding": P(None, "fsdp")},
    "hidden": {"bias": P()},
    "head": {"kernel": P("fsdp", "tensor")},
}


def narrow_params(mesh: Mesh | None = None, std: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """At random, on one device or in parts on those of a mesh."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.float32(std * rng.standard_normal(shape))  # noqa: E731
    made = {
        "embed": {"embedding": draw(WIDE, 16)},
        "hidden": {"bias": draw(16)},
        "head": {"kernel": draw(16, WIDE)},
    }
    if mesh is None:
        return jax.tree.map(jnp.asarray, made)
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    return jax.device_put(made, jax.tree.map(place, LAYOUT, is_leaf=lambda x: isinstance(x, P)))

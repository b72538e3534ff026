"""A scorer: a reward model, which gives a number to a whole completion instead of one to each token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trainjax import tree
from trainjax.models import Model
from trainjax.nn import body
from trainjax.policies import Policy
from trainjax.types import Batch, Params, Peft, pytree, static


@pytree
class Scorer:
    """`scorer(params, batch) -> scores`: a linear head on the state of a completion's last token.

    For `losses.bradley_terry` and what else compares scores. What trains is
    `{"body": adapter or weights, "score": {"kernel": [hidden, objectives]}}`. The head that makes
    tokens is not part of it.

    Attributes:
        body: makes the hidden states, with the frozen weights if it has an adapter.
        size: completions of a group: two in pairs, one where each stands alone.
        padding: the token that `config.json` pads with, at which no completion is scored unless it is
            nothing else; None where it names none.
    """

    body: Policy
    size: int = static(2)
    padding: int | None = static(None)

    def __call__(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch groups {self.size} *objectives"]:
        """Scores of the batch's completions, in float32.

        Args:
            params: of body and head.
            batch: `tokens`, `segments`, `positions`, `completions` and `groups`, and `prefixes` where
                completions share their prompt.
            key: turns dropout on.

        Returns:
            A score each, or with several objectives one of each on a last axis, for
            `losses.reward.weighted_objectives`. A completion that is not there scores 0.
        """
        hidden = self.body.hidden(params["body"], batch, key)
        groups, kernel = batch["groups"].shape[1], params["score"]["kernel"]
        padded = None if self.padding is None else batch["tokens"] == self.padding
        flat = last_token_scores(hidden, kernel, batch["completions"], groups * self.size, padded)
        scores = flat.reshape(len(flat), groups, self.size, -1)
        return scores if kernel.shape[1] > 1 else scores[..., 0]


def last_token_scores(
    hidden: Float[Array, "batch seq embed"],
    kernel: Float[Array, "embed objectives"],
    completions: Int[Array, "batch seq"],
    count: int,
    padded: Bool[Array, "batch seq"] | None = None,
) -> Float[Array, "batch {count} objectives"]:
    """`state @ kernel` where completion 1, 2, ..., `count` has its last token, in float32; 0 if it has none.

    Args:
        hidden: final states.
        kernel: a column for each objective.
        completions: which one a token belongs to; 0 for none.
        count: how many there may be.
        padded: tokens that come last only where a completion has no others: the end of a text in a model
            that pads with it.

    Source: agrees with `LlamaForSequenceClassification` of transformers 5, which looks for the last token
    that is not `pad_token_id`.
    """
    batch, seq, embed = hidden.shape
    # Products of rows, which are fast on every platform; float32 even where a product of it is not.
    flat = jnp.matmul(
        hidden.astype(jnp.float32).reshape(-1, embed),
        kernel.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    mine = completions[..., None] == jnp.arange(1, count + 1)
    place = jnp.broadcast_to(jnp.arange(seq), completions.shape)
    place = (place if padded is None else jnp.where(padded, place, place + seq))[..., None]
    last = jnp.max(jnp.where(mine, place, -1), axis=1, keepdims=True)
    # A choice and a sum: no gather, whose gradient scatters, and nothing read from padding.
    chosen = jnp.where((place == last)[..., None], flat.reshape(batch, seq, 1, -1), 0.0)
    return jnp.sum(chosen, axis=1)


def scorer(model: Model, method: Peft | None = None, size: int = 2) -> Scorer:
    """The scorer that trains: `method`'s adapter on the model, or the whole model without one.

    A text is scored at its last token that is not the model's `pad_token_id`, as transformers does: one
    number here, in the merged folder and in PEFT over the base, also where the end of a text pads.

    Args:
        model: its own head, if it has one, is left out.
        method: `peft.lora(...)` and the like.
        size: completions of a group.
    """
    base = None if method is None else body(model.params)
    return Scorer(Policy(base, model.module, method), size, model.hf.get("pad_token_id"))


def init_scorer(
    key: PRNGKeyArray, model: Model, method: Peft | None = None, objectives: int = 1
) -> Params:
    """The params of `scorer(model, method)` before training, in float32.

    The head is drawn with the model's `initializer_range` (0.02 if it names none), as transformers
    does: scores begin near 0. Of several keys, `jax.vmap` makes the members of a `losses.ensemble`.

    Args:
        key: of head and adapter.
        model: what the scorer is made of.
        method: the adapter's functions; None to train every weight.
        objectives: scores of each completion.

    Raises:
        ValueError: fewer than one objective.
    """
    if objectives < 1:
        raise ValueError(f"objectives={objectives}: a scorer gives at least one score")
    weights = body(model.params)
    if method is None:
        trained: Any = tree.cast(weights, jnp.float32)
    else:
        trained = method.init(tree.key_for(key, "body"), weights)
    std = model.hf.get("initializer_range", 0.02)
    shape = model.config.hidden_size, objectives
    kernel = std * jax.random.normal(tree.key_for(key, "score"), shape, jnp.float32)
    return {"body": trained, "score": {"kernel": kernel}}

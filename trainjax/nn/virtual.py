"""Virtual tokens: what prompts and prefixes add to the params, as keys and values of every layer.

Params may hold one of

| leaf                         | shape                                    | what                            |
|------------------------------|------------------------------------------|---------------------------------|
| `prefix/key`, `prefix/value` | `[layers, virtual, kv_heads * head_dim]` | not rotated                     |
| `prompt/embedding`           | `[virtual, embed]`                       | before the embeddings of a text |

They come before every example, which then begins at position `virtual`. No token is ahead of them, so
what they are does not depend on the text: a prompt goes through the layers once, whatever the batch,
and is a prefix from there on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from trainjax.types import Params

KEPT = "kept"
"""The collection in which attention layers leave their keys and values, if it is mutable."""


class Virtual(NamedTuple):
    """Keys and values of the virtual tokens, rotated if they are to be; float32.

    As many layers as the arrays have; `scan` gives each layer its own.
    """

    keys: Float[Array, "*layers kv_heads virtual dim"]
    values: Float[Array, "*layers kv_heads virtual dim"]


def num_virtual_tokens(params: Params) -> int:
    """How many virtual tokens come before every example."""
    if "prefix" in params:
        return params["prefix"]["key"].shape[-2]
    return params["prompt"]["embedding"].shape[-2] if "prompt" in params else 0


def virtual_tokens(module: Any, params: Params) -> Virtual | None:
    """The virtual tokens of the params for all layers, or None if there are none.

    Args:
        module: the `Decoder`.
        params: its params.
    """
    if "prefix" in params:
        return _prefix(module, params["prefix"])
    return _prompt(module, params) if "prompt" in params else None


def _prefix(module: Any, stacks: Params) -> Virtual:
    c = module.config
    heads = (c.num_layers, -1, c.num_kv_heads, c.head_dim)
    keys, values = (stacks[name].reshape(heads) for name in ("key", "value"))
    return _heads_first(keys, values)


def _prompt(module: Any, params: Params) -> Virtual:
    """What the layers make of a row that holds the prompt alone."""
    embeddings = params["prompt"]["embedding"][None]
    without = {name: part for name, part in params.items() if name != "prompt"}
    positions = jnp.arange(embeddings.shape[1])[None]
    _, found = module.apply({"params": without}, embeddings, positions, mutable=[KEPT])
    kept = found[KEPT]["layers"]["attention"]
    return _heads_first(kept["keys"][:, 0], kept["values"][:, 0])


def _heads_first(*stacks: Float[Array, "layers virtual kv_heads dim"]) -> Virtual:
    # In float32 from here: their gradients are sums over the rows of the batch.
    return Virtual(*(stack.swapaxes(1, 2).astype(jnp.float32) for stack in stacks))

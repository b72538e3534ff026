"""Both ends of a language model as leaves that adapters change: the embedding, and the head tied to it."""

from __future__ import annotations

from collections.abc import Collection

from trainjax import tree
from trainjax.ops.head import Tied
from trainjax.types import Params

EMBEDDING, HEAD = "embed/embedding", "head/kernel"


def with_head(params: Params) -> Params:
    """The params with their output head as a leaf of its own, also where it is the embedding.

    What changes one of the two leaves the other as it is then, as in PEFT.
    """
    named = tree.flatten(params)
    if HEAD in named or EMBEDDING not in named:
        return params
    return {**params, "head": {"kernel": Tied(named[EMBEDDING])}}


def parted(params: Params, changed: Collection[str]) -> Params:
    """The params, with a head of its own if the embedding or the head is among the leaves to change."""
    return with_head(params) if {EMBEDDING, HEAD} & set(changed) else params


def plain(params: Params) -> Params:
    """The params with an array for a head that still is the embedding."""
    head = tree.flatten(params).get(HEAD)
    if not isinstance(head, Tied):
        return params
    return tree.replace(params, {HEAD: head.embedding.T})

"""Data: rows of any known format to batches of arrays; deterministic, sharded, exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from trainjax.data.encode import Examples, drop, encode, refuse, truncate
from trainjax.data.groups import Group, Read, encode_groups, labelled, pair, scored, single
from trainjax.data.packing import Pack, best_fit, fullest, unpacked
from trainjax.data.pipeline import Loader, Plan, fill, one_epoch, sequence_mean, token_mean
from trainjax.data.reference import load_reference, save_reference, with_reference
from trainjax.data.scores import conditioned, score_tokens
from trainjax.data.sources import Source, read
from trainjax.data.templates import apply_template

__all__ = [
    "Pack",
    "Source",
    "Examples",
    "Group",
    "Loader",
    "Plan",
    "Read",
    "apply_template",
    "best_fit",
    "conditioned",
    "drop",
    "encode",
    "encode_groups",
    "fill",
    "fullest",
    "labelled",
    "load_reference",
    "one_epoch",
    "pair",
    "preferences",
    "read",
    "refuse",
    "row_length",
    "save_reference",
    "score_tokens",
    "scored",
    "sequence_mean",
    "single",
    "supervised",
    "token_mean",
    "truncate",
    "unpacked",
    "with_reference",
]


def supervised(
    source: str | Path | Source,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int = 512,
    packing: Pack = best_fit,
    seed: int | None = 0,
    mesh: Mesh | None = None,
) -> Loader:
    """Batches for supervised fine-tuning from a file, a named dataset or rows.

    Args:
        source: what `read` takes, or rows: anything with `len` and `[index]` that gives dicts.
        tokenizer: the model's.
        batch_size: rows of a batch, over all devices.
        max_length: tokens of a row; longer examples are cut.
        packing: `best_fit` puts several examples in a row, `unpacked` pads each.
        seed: of the shuffling, anew each epoch; None keeps the order.
        mesh: the mesh that rows are split over.
    """
    rows = read(source) if isinstance(source, str | Path) else source
    examples = encode(rows, tokenizer, max_length)
    return Loader(examples, Plan(batch_size, max_length, packing, seed), mesh)


def preferences(
    source: str | Path | Source,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int = 512,
    packing: Pack = unpacked,
    share_prompt: bool = True,
    seed: int | None = 0,
    mesh: Mesh | None = None,
) -> Loader:
    """Batches of pairs, labelled completions or scored lists, for the losses that compare them.

    Args:
        source: what `read` takes, or rows; see `groups.FORMATS` for their columns.
        tokenizer: the model's.
        batch_size: rows of a batch, over all devices: one group each, unless they are packed.
        max_length: tokens of a prompt with one completion; longer ones are cut.
        packing: `unpacked` for one group a row, `best_fit` for several.
        share_prompt: the prompt's tokens once for all its completions, which changes no result; not
            for models with a sliding window.
        seed: of the shuffling, anew each epoch; None keeps the order.
        mesh: the mesh that rows are split over.
    """
    rows = read(source) if isinstance(source, str | Path) else source
    examples = encode_groups(rows, tokenizer, max_length, share_prompt=share_prompt)
    return Loader(examples, Plan(batch_size, row_length(examples, max_length), packing, seed), mesh)


def row_length(examples: Examples, max_length: int) -> int:
    """Tokens of a row that holds every example: `max_length`, or what the longest group takes."""
    longest = int(examples.lengths.max())
    return max_length if longest <= max_length else -(-longest // 64) * 64

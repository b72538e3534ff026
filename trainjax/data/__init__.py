"""Data: rows of any known format to batches of arrays; deterministic, sharded, exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from trainjax.data.encode import Examples, drop, encode, refuse, truncate
from trainjax.data.packing import Pack, best_fit, unpacked
from trainjax.data.pipeline import Loader, Plan, fill, one_epoch, sequence_mean, token_mean
from trainjax.data.render import apply_template
from trainjax.data.sources import Source, read

__all__ = [
    "Pack",
    "Source",
    "Examples",
    "Loader",
    "Plan",
    "apply_template",
    "best_fit",
    "drop",
    "encode",
    "fill",
    "one_epoch",
    "read",
    "refuse",
    "sequence_mean",
    "supervised",
    "token_mean",
    "truncate",
    "unpacked",
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

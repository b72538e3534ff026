"""Log-probabilities of a reference, computed once for all epochs and runs, and kept beside the data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainjax import platform
from trainjax.data.encode import Examples
from trainjax.data.packing import unpacked
from trainjax.data.pipeline import Plan, fill, own_rows, to_devices
from trainjax.types import Batch

_NAME = "reference_logprobs"

Logprobs = Callable[[Batch], Any]
"""`(batch) -> [batch, seq]`: the log-probability of each token; what is no target may be anything."""


def with_reference(
    examples: Examples,
    logprobs: Logprobs,
    *,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """The examples with what a reference makes of their tokens; batches carry it from then on.

    Args:
        examples: from `encode` or `encode_groups`.
        logprobs: the reference, jitted: `(batch) -> [batch, seq]` float32.
        batch_size: rows at once.
        mesh: the mesh that rows are split over.
        progress: called with the number of examples done.
    """
    plan = Plan(batch_size, int(examples.lengths.max()), unpacked)
    found = np.zeros(len(examples.tokens), np.float32)
    done, rows = 0, own_rows(batch_size, mesh)
    for batch in plan.epoch(examples, 0):
        values = logprobs(to_devices(fill(examples, plan, batch, rows=rows), mesh, plan.batch_size))
        for (example,), row in zip(
            batch.rows, platform.get(values), strict=False
        ):  # the last may be fewer
            here = examples.slice_of(example)
            found[here] = row[: here.stop - here.start]
        done += len(batch.rows)
        progress(done)
    return dataclasses.replace(examples, reference=found)


def save_reference(path: str | Path, examples: Examples, model: str) -> None:
    """Writes the log-probabilities with what they are of; the file appears whole or not at all.

    Args:
        path: a safetensors file.
        examples: from `with_reference`.
        model: fingerprint of the reference.
    """
    if examples.reference is None:
        raise ValueError("these examples have no log-probabilities of a reference: with_reference")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        save_file({_NAME: examples.reference}, temporary, metadata=_of(examples, model))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_reference(path: str | Path, examples: Examples, model: str) -> Examples:
    """The examples with the log-probabilities of a file that `save_reference` wrote.

    Args:
        path: the file.
        examples: the same as those it was made of.
        model: fingerprint of the reference that it must be of.

    Raises:
        ValueError: it is of other rows, settings or weights, or damaged.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="np") as file:
            found, values = file.metadata() or {}, file.get_tensor(_NAME)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it") from error
    for what, now in _of(examples, model).items():
        if found.get(what) != now:
            raise ValueError(
                f"{path} holds log-probabilities of other {what} (fingerprint {found.get(what)}, now "
                f"{now}); delete it to have them computed again"
            )
    return dataclasses.replace(examples, reference=values)


def _of(examples: Examples, model: str) -> dict[str, str]:
    return {"examples": examples.fingerprint(), "weights": model}

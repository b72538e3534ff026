"""The models that are merged: opened, checked to be of one kind, and read in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from trainjax.io.hub import open_checkpoint
from trainjax.merging.method import Block
from trainjax.tree import nearest
from trainjax.types import Checkpoint


@runtime_checkable
class InParts(Checkpoint, Protocol):
    """A checkpoint whose tensors can be read a few rows at a time."""

    def dtype(self, name: str) -> np.dtype:
        """What the tensor's numbers are."""
        ...

    def parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The tensor's rows, first to last, as many at a time."""
        ...


class Source(NamedTuple):
    """A model to merge.

    Attributes:
        label: what the user calls it.
        files: its checkpoint.
        shapes: its tensors by name, without those that only repeat others.
    """

    label: str
    files: InParts
    shapes: Mapping[str, tuple[int, ...]]


def opened(model: str | Path) -> Source:
    """A model's files.

    Raises:
        ValueError: no such model, or one whose weights are quantised in a way that hides them.
    """
    files = open_checkpoint(model)
    if "quantization_config" in files.config or not isinstance(files, InParts):
        raise ValueError(f"the weights of {model} are quantised; merge the model before it was")
    return Source(str(model), files, _own_tensors(files))


_REPEATED = "rotary_emb.inv_freq"  # buffers that old files carry, which follow from the config


def _own_tensors(files: Checkpoint) -> dict[str, tuple[int, ...]]:
    tied = "lm_head.weight" if files.config.get("tie_word_embeddings") else None
    shapes = files.shapes().items()
    return {n: shape for n, shape in shapes if n != tied and not n.endswith(_REPEATED)}


_STRUCTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
"""What has to be equal besides the tensors' names and shapes: how their numbers are used."""


def check_alike(first: Source, other: Source) -> None:
    """Raises ValueError unless the two are of one architecture; the message names what differs."""
    one, two = first.files.config, other.files.config
    for key in _STRUCTURE:
        if key in one and key in two and one[key] != two[key]:
            raise ValueError(
                f"{other.label} has {key}={two[key]!r}, {first.label} has {one[key]!r}: only models of "
                "one architecture can be merged"
            )
    for here, there in ((first, other), (other, first)):
        if missing := [name for name in here.shapes if name not in there.shapes]:
            raise ValueError(
                f"{there.label} has no tensor {missing[0]!r}, which {here.label} has "
                f"({len(missing)} such tensors){nearest(missing[0], there.shapes)}"
            )
    for name, shape in first.shapes.items():
        if other.shapes[name] != shape:
            raise ValueError(
                f"{name} is {other.shapes[name]} in {other.label} and {shape} in {first.label}: only "
                "tensors of one shape can be merged"
            )


def check_tokens(first: Source, one: Any, other: Source, two: Any) -> None:
    """Raises ValueError if an id is one token to the first tokenizer and another to the second."""
    if one is None or two is None:
        return
    token_of = {index: token for token, index in one.get_vocab().items()}
    for token, index in sorted(two.get_vocab().items(), key=lambda item: item[1]):
        if token_of.get(index, token) != token:
            raise ValueError(
                f"token {index} is {token_of[index]!r} to the tokenizer of {first.label} and {token!r} "
                f"to that of {other.label}, so their embeddings are of different things; say that it "
                "is meant: other_tokenizer"
            )


class Blocks:
    """A tensor's blocks, `count` of them, read from the files each time that they are gone through.

    Args:
        base: the base, or None.
        models: the models to merge.
        name: the tensor.
        size: numbers in a block, at most (a row at least).

    Raises:
        ValueError: numbers that are not floating-point or not finite; the message names the tensor.
    """

    def __init__(self, base: Source | None, models: Sequence[Source], name: str, size: int) -> None:
        self._sources = ([] if base is None else [base]) + list(models)
        self._has_base = base is not None
        self._name = name
        shape = self._sources[0].shapes[name] or (1,)
        self._row = math.prod(shape[1:])
        self._rows = max(1, size // max(1, self._row))
        self.count = -(-shape[0] // self._rows)

    def __iter__(self) -> Iterator[Block]:
        readers = [source.files.parts(self._name, self._rows) for source in self._sources]
        start = 0
        for parts in zip(*readers, strict=True):
            wide = [
                _checked(self._name, source, part)
                for source, part in zip(self._sources, parts, strict=True)
            ]
            base = wide.pop(0) if self._has_base else None
            yield Block(self._name, start, base, wide)
            start += self._rows * self._row


def _checked(name: str, source: Source, part: np.ndarray) -> np.ndarray:
    """The part in float32, if it is numbers that can be merged."""
    if not jnp.issubdtype(part.dtype, np.floating):
        raise ValueError(f"{name} of {source.label} is {part.dtype}; only floats can be merged")
    with np.errstate(over="ignore"):
        wide = part.astype(np.float32, copy=False)
    if not np.isfinite(wide).all():
        raise ValueError(
            f"{name} of {source.label} holds NaN or infinite numbers: the file is damaged, or its "
            "training had diverged"
        )
    return wide

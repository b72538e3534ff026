"""GGUF files, the format of llama.cpp, as a `Checkpoint`: Hugging Face names, layouts and config.

A GGUF file is a header (metadata and a table of tensors) and the tensors' bytes. What the bytes of a
quantised tensor mean is left to `gguf.quants`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from trainjax.io.gguf_architectures import architecture, by_hf_name
from trainjax.io.gguf_header import Tensor, block_of, num_bytes, read_header
from trainjax.io.tokenizer import from_gguf
from trainjax.tree import nearest
from trainjax.types import Blocks


@final
class GgufFile:
    """A GGUF file as a `Checkpoint`, read one tensor at a time.

    Quantised tensors come as float32, F32 and F16 ones as they are, BF16 as `ml_dtypes.bfloat16`.
    Only the config and the table of tensors stay in memory: `read` maps its tensor's bytes alone,
    and unmaps them.

    >>> GgufFile("model.gguf").config["hidden_size"]  # doctest: +SKIP
    576

    Raises:
        ValueError: not a GGUF file, a damaged one, or a model that cannot be said in the terms of
            `transformers`; the message names the path and the reason.
    """

    config: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        header = read_header(self._path)
        try:
            self._architecture = architecture(header.metadata)
            self._ends = _end_tokens(header.metadata)
            self._tensors = by_hf_name(header.tensors, self._architecture.names)
            self.config = self._architecture.config(
                header.metadata, header.tensors, lambda name: self._load(name, header.tensors[name])
            )
        except ValueError as error:
            raise ValueError(f"{self._path} cannot be used: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by Hugging Face name, rows (out) first, without reading the tensors."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, an array of its own in the layout of `transformers`.

        Raises:
            KeyError: no tensor has that name; the message suggests the nearest.
            ValueError: the tensor's type is not supported; the message names both.
        """
        values = self._load(name, self._found(name))
        order = self._architecture.rows(name, len(values), self.config)
        return values if order is None else values[order]

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives the tensor's numbers as."""
        kind = self._tensors[name].type
        return np.dtype(next((_DTYPES[known] for known in _DTYPES if known == kind), np.float32))

    def parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The tensor a few rows at a time; all of it is in memory meanwhile."""
        values = self.read(name)
        for start in range(0, len(values), rows):
            yield values[start : start + rows]

    def blocks(self, name: str) -> Blocks | None:
        """One matrix as the file has it, its rows in the order of `transformers`; None if not in blocks.

        Raises:
            KeyError: no tensor has that name; the message suggests the nearest.
        """
        tensor = self._found(name)
        size, bytes_each = block_of(tensor.type)
        if size == 1 or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        data = np.array(self._bytes(tensor)).reshape(rows, columns // size, bytes_each)
        order = self._architecture.rows(name, rows, self.config)
        return Blocks(data if order is None else data[order], _type_name(tensor.type))

    def tokenizer(self) -> Any | None:
        """The `PreTrainedTokenizerFast` with its chat template; None where there is no vocabulary.

        Reads the header anew: that is quick, and the vocabulary need not stay in memory.
        """
        metadata = read_header(self._path).metadata
        return from_gguf(metadata) if "tokenizer.ggml.tokens" in metadata else None

    def generation(self) -> dict[str, Any]:
        """The end tokens, where the file names several: of the text, of a turn, of a message."""
        return {"eos_token_id": self._ends} if len(self._ends) > 1 else {}

    def _load(self, name: str, tensor: Tensor) -> np.ndarray:
        if tensor.type not in _SUPPORTED:
            raise ValueError(
                f"tensor {name!r} of {self._path} has the type {_type_name(tensor.type)}; the "
                f"types that can be read are {', '.join(kind.name for kind in _SUPPORTED)}"
            )
        kind = GGMLQuantizationType(tensor.type)
        return _dequantise(self._bytes(tensor), kind).reshape(tensor.shape)

    def _bytes(self, tensor: Tensor) -> np.ndarray:
        return np.memmap(self._path, np.uint8, "r", tensor.offset, (num_bytes(tensor),))

    def _found(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"{self._path} has no tensor {name!r}{nearest(name, self._tensors)}")
        return self._tensors[name]


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens after which llama.cpp stops, as far as the file names them."""
    ids = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(id_ for id_ in ids if id_ is not None))


_SUPPORTED = [
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
]
_DTYPES: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}
_CHUNK = 1 << 18
"""Numbers dequantised at a time: `gguf.quants` makes several arrays as large as what it gets."""


def _dequantise(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers, one-dimensional, that the bytes of a tensor stand for."""
    if kind in _DTYPES:
        return np.array(raw).view(_DTYPES[kind])
    block, size = GGML_QUANT_SIZES[kind]
    values = np.empty(len(raw) // size * block, np.float32)
    blocks = _CHUNK // block
    for first in range(0, len(raw) // size, blocks):
        # One row of many blocks: `dequantize` loops in Python over rows.
        part = np.asarray(raw[first * size : (first + blocks) * size])
        values[first * block : (first + blocks) * block] = quants.dequantize(part[None], kind)[0]
    return values


def _type_name(kind: int) -> str:
    return next((known.name for known in GGMLQuantizationType if known == kind), f"number {kind}")

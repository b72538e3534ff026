"""The header of a GGUF file: its metadata, and the table of its tensors.

Parsed here, as `gguf.GGUFReader` makes an array object of every number and string of the vocabulary:
that took 4 s and 130 MB on SmolLM2-135M, where this takes 0.2 s and 10 MB.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gguf import GGML_QUANT_SIZES


class Tensor(NamedTuple):
    """One line of the table of tensors.

    Attributes:
        shape: rows first, as in NumPy; the file has it reversed.
        type: the number of the `GGMLQuantizationType`, which may be one unknown to `gguf`.
        offset: of the first byte, from the start of the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


class Header(NamedTuple):
    """What a GGUF file says before its tensors' bytes.

    Attributes:
        metadata: plain Python values by key; arrays are lists.
        tensors: by the file's own names.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The metadata and the table of tensors of a GGUF file, versions 2 and 3, little-endian.

    Raises:
        ValueError: not a GGUF file, or one that ends before its header or its tensors do.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
        try:
            return _header(_Cursor(file, end=path.stat().st_size))
        except ValueError as error:
            raise ValueError(f"{path} is not a GGUF file that can be read: {error}") from error


def _header(cursor: _Cursor) -> Header:
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, where 2 or 3 (little-endian) is supported")
    count, keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(keys)}
    table = {cursor.string(): cursor.tensor() for _ in range(count)}
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r} is not a number of bytes")
    start = -(-cursor.position() // alignment) * alignment
    tensors = {
        name: tensor._replace(offset=start + tensor.offset) for name, tensor in table.items()
    }
    for name, tensor in tensors.items():
        if tensor.shape[-1] % block_of(tensor.type)[0]:
            raise ValueError(f"a row of tensor {name!r}, shape {tensor.shape}, is not whole blocks")
        if tensor.offset + num_bytes(tensor) > cursor.end:
            raise ValueError(f"it ends before the bytes of tensor {name!r} do")
    return Header(metadata, tensors)


_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The codes of `struct` by the number that GGUF has for a type."""

_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads the parts of a header one after another, and never past the file's end."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self.end = end

    def position(self) -> int:
        return self._file.tell()

    def take(self, size: int) -> bytes:
        # Checked before reading: a damaged length would ask for more memory than there is.
        if size > self.end - self.position():
            raise ValueError(f"it ends at byte {self.end}, inside its header")
        return self._file.read(size)

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            if item == _STRING:
                return [self.string() for _ in range(length)]
            return list(self.scalars(_code(item), length))
        return self.scalar(_code(kind))

    def tensor(self) -> Tensor:
        shape = tuple(reversed(self.scalars("Q", self.scalar("I"))))
        return Tensor(shape or (1,), self.scalar("I"), self.scalar("Q"))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return _SCALARS[kind]


def num_bytes(tensor: Tensor) -> int:
    """The tensor's size in the file; 0 where its type is unknown."""
    block, size = block_of(tensor.type)
    return math.prod(tensor.shape) // block * size


def block_of(kind: int) -> tuple[int, int]:
    """How many numbers a block of the type holds in how many bytes; (1, 0) for an unknown type."""
    return next((sizes for known, sizes in GGML_QUANT_SIZES.items() if known == kind), (1, 0))

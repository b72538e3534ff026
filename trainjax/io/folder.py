"""A Hugging Face model folder: `config.json`, safetensors in one file or several, a tokenizer."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainjax.io import tokenizer as tokenizers
from trainjax.retries import retried
from trainjax.types import Blocks

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
"""The file of end tokens and sampling settings beside a model."""


_FLOATS = ("F64", "F32", "F16", "BF16")
_F8: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


class _Stored(NamedTuple):
    """Where a tensor is, and as what."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class HfFolder:
    """A model folder as a `Checkpoint`.

    Args:
        path: the folder.

    Raises:
        ValueError: no config, no safetensors, a shard that is missing or damaged; each by path.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{self.path} is not a model folder: it has no config.json")
        self.config: dict[str, Any] = retried(_read_json, self.path / "config.json")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._index.items()}

    def read(self, name: str) -> np.ndarray:
        return retried(self._read, name)

    def _read(self, name: str) -> np.ndarray:
        file, _, kind = self._index[name]
        if kind not in _FLOATS:
            raise ValueError(
                f"{name} is stored as {kind}: codes of a quantised model and no weights; give the "
                "original ones"
            )
        # Opened anew for each tensor, with pread: a mapping that stays open keeps every page that
        # was read in the process's resident memory, which doubles the peak of loading.
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def dtype(self, name: str) -> np.dtype:
        """What the tensor's numbers are stored as."""
        return next(self.parts(name, 1)).dtype

    def kind(self, name: str) -> str:
        """What safetensors calls the tensor's dtype: `BF16`, `F8_E4M3`."""
        return self._index[name].kind

    def codes(self, name: str) -> np.ndarray:
        """A tensor of 8-bit floats, of which safetensors' reader for NumPy knows nothing."""
        return retried(self._codes, name)

    def _codes(self, name: str) -> np.ndarray:
        path, shape, kind = self._index[name]
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            start, end = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + start)
            return np.frombuffer(file.read(end - start), _F8[kind]).reshape(shape)

    def parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The tensor a few rows at a time; no more of it is in memory. A scalar is one row."""
        file, shape, _ = self._index[name]
        if not shape:
            yield self.read(name).reshape(1)
            return
        for start in range(0, shape[0], rows):
            # Mapped: with pread all of the tensor would be read for any slice of it.
            with _opened(file, "mmap") as tensors:
                yield tensors.get_slice(name)[start : min(start + rows, shape[0])]

    def blocks(self, name: str) -> Blocks | None:
        return None

    def tokenizer(self) -> Any | None:
        return tokenizers.from_folder(self.path)

    def generation(self) -> dict[str, Any]:
        """The contents of `generation_config.json`; empty where there is none."""
        file = self.path / GENERATION
        return retried(_read_json, file) if file.is_file() else {}

    @functools.cached_property
    def _index(self) -> dict[str, _Stored]:
        found = {}
        for file in self._files():
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    found[name] = _Stored(file, tuple(part.get_shape()), part.get_dtype())
        return found

    def _files(self) -> list[Path]:
        index = self.path / _INDEX
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
            files = [self.path / name for name in names]
        else:
            files = [self.path / _SINGLE]
        if missing := [file for file in files if not file.is_file()]:
            pickles = sorted(self.path.glob("*.bin")) + sorted(self.path.glob("*.pt*"))
            why = f"; {pickles[0].name} is a pickle, which is never loaded" if pickles else ""
            raise ValueError(f"{missing[0]} does not exist{why}")
        return files


def _opened(file: Path, backend: Literal["pread", "mmap"] = "pread") -> Any:
    try:
        return safe_open(file, framework="np", backend=backend)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def write_shards(
    path: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int = 5 * 2**30
) -> None:
    """Writes tensors as safetensors, in files of at most `max_bytes` with an index if it takes several.

    Tensors are taken from the iterable one by one, and a file's worth is in memory at a time. Of several
    processes, which all take part in gathering a tensor, the first one writes.
    """
    if not is_writer():
        collections.deque(tensors, maxlen=0)
        return
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = path / f"model-{len(shards) + 1:05d}.tmp"
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files that only their owner may read
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_bytes:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    _name_shards(path, shards, total)


def stream_shards(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    parts: Callable[[str], Iterable[np.ndarray]],
    max_bytes: int = 5 * 2**30,
) -> None:
    """Writes tensors part by part, in files as `write_shards` makes; only a part is in memory.

    Args:
        path: the folder.
        tensors: shapes and dtypes by name, in the order of the files.
        parts: by a tensor's name its rows, first to last.
        max_bytes: of a file, if not a single tensor takes more.

    Raises:
        ValueError: a dtype that safetensors has no name for.
    """
    sizes = {name: _num_bytes(shape, dtype) for name, (shape, dtype) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_bytes:
            shards.append([])
        shards[-1].append(name)
    for number, names in enumerate(shards, 1):
        with (path / f"model-{number:05d}.tmp").open("wb") as file:
            file.write(_header({name: tensors[name] for name in names}))
            for name in names:
                for part in parts(name):
                    file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    _name_shards(path, shards, sum(sizes.values()))


_SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """What a safetensors file says before its tensors' bytes; a multiple of 8 bytes with its length."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        if dtype.name not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} cannot be written as {dtype.name}")
        start, end = end, end + _num_bytes(shape, dtype)
        entry = {"shape": list(shape), "data_offsets": [start, end]}
        table[name] = {"dtype": _SAFETENSORS_DTYPES[dtype.name], **entry}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _name_shards(path: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (path / "model-00001.tmp").replace(path / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (path / f"model-{number:05d}.tmp").replace(path / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(path / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as the ecosystem formats it."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def is_writer() -> bool:
    """Whether this process writes the files that all processes have one of."""
    return jax.process_index() == 0


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into, which takes its name when the block ends well.

    Of several processes the first one writes; the others' folder is for nothing, and goes.

    Raises:
        ValueError: `path` exists and holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    if not is_writer():
        with tempfile.TemporaryDirectory() as nothing:
            yield Path(nothing)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; give the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write, which takes its place when the block ends well.

    Of several processes the first one writes; the others' file is for nothing, and goes.
    """
    if not is_writer():
        with tempfile.TemporaryDirectory() as nothing:
            yield Path(nothing) / path.name
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error

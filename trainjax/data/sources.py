"""Where rows come from: files, Hugging Face `datasets`, TFDS, and any Grain source.

A source is anything with `len` and `[index]` that gives a dict: a list, a `datasets.Dataset`, a
`grain.sources` data source, what `tfds.data_source` returns. `read` opens the ones that have a name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trainjax.retries import retried

Row = Mapping[str, Any]


@runtime_checkable
class Source(Protocol):
    """Rows by number, as `grain.sources.RandomAccessDataSource` has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Row: ...


def read(name: str | Path) -> Source:
    """The rows of a file or a named dataset.

    Args:
        name: a `.jsonl` or `.json` file (plain, `.gz` or `.zst`), a `.parquet` or `.csv` file, a folder
            saved by `datasets`, `hf:NAME[:SPLIT]` or `tfds:NAME[:SPLIT]` (split `train` by default).

    Raises:
        ValueError: no such file, an ending that is not known, a line that is not a JSON object.
    """
    text = str(name)
    if text.startswith("hf:"):
        return _hugging_face(*_split_name(text))
    if text.startswith("tfds:"):
        return _TfdsRows(*_split_name(text))
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    rows = retried(_read_file, path)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _read_file(path: Path) -> list[Row]:
    endings = [suffix.lower() for suffix in path.suffixes]
    kind = endings[-2] if endings[-1:] and endings[-1] in (".gz", ".zst") and endings[:-1] else None
    kind = kind or (endings[-1] if endings else "")
    if kind == ".parquet":
        return _parquet(path)
    if kind not in (".jsonl", ".ndjson", ".json", ".csv"):
        raise ValueError(
            f"{path}: cannot tell its format; a file ends in .jsonl, .json, .csv (also .gz or .zst) "
            "or .parquet"
        )
    try:
        with _opened(path) as file:
            if kind == ".csv":
                return list(csv.DictReader(file))
            return list(_json_rows(path, file, one_array=kind == ".json"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _opened(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{path} needs the package zstandard: pip install zstandard"
            ) from error
        return zstandard.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_rows(path: Path, file: io.TextIOBase, *, one_array: bool) -> Iterator[Row]:
    if one_array:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from _checked_array(path, file)
            return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: a row is an object, this is a {type(row).__name__}"
            )
        yield row


def _checked_array(path: Path, file: io.TextIOBase) -> list[Row]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, item {number}: a row is an object, this is a {type(row).__name__}"
            )
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _split_name(text: str) -> tuple[str, str]:
    _, name, *split = text.split(":")
    return name, split[0] if split else "train"


def _hugging_face(name: str, split: str) -> Source:
    return _datasets().load_dataset(name, split=split)


def _saved_dataset(path: Path) -> Source:
    dataset = _datasets().load_from_disk(str(path))
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise ValueError(f"{path} has the splits {', '.join(dataset)}; give the folder of one")
        dataset = dataset["train"]
    return dataset


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this source needs the package datasets: pip install datasets") from error
    return datasets


class _TfdsRows:
    """A TFDS split through its array_record data source, which needs no TensorFlow."""

    def __init__(self, name: str, split: str) -> None:
        import tensorflow_datasets as tfds

        if Path(name).is_dir():
            self._rows = tfds.builder_from_directory(name).as_data_source(split)
        else:
            self._rows = tfds.data_source(name, split=split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Row:
        return _plain(self._rows[index])


def _plain(value: Any) -> Any:
    """TFDS features as JSON has them: text for bytes, lists for arrays, a list of dicts for a
    sequence of features (which TFDS gives as a dict of arrays).
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        plain = {key: _plain(item) for key, item in value.items()}
        columns = list(plain.values())
        if len(columns) > 1 and all(
            isinstance(c, list) and len(c) == len(columns[0]) for c in columns
        ):
            return [dict(zip(plain, items, strict=True)) for items in zip(*columns, strict=True)]
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

"""Sources of rows by name: files, Hugging Face `datasets`, TFDS, and any Grain source.

A source is anything with `len` and `[index]` that gives a dict: a list, a `datasets.Dataset`, a
`grain.sources` data source, what `tfds.data_source` returns. `read` opens the ones that have a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trainjax.data.files import OnUnreadable, Row, read_file, refused, without_filled
from trainjax.retries import retried


@runtime_checkable
class Source(Protocol):
    """Rows by number, as `grain.sources.RandomAccessDataSource` has it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Row: ...


def read(name: str | Path, unreadable: OnUnreadable = refused) -> Source:
    """The rows of a file or a named dataset.

    Text is read as UTF-8, with or without a byte-order mark. Half a surrogate pair in JSON becomes U+FFFD.
    What Arrow fills in (Parquet, `datasets`) is taken out again: see `files.without_filled`.

    Args:
        name: a `.jsonl`, `.json`, `.csv` or `.tsv` file (plain, `.gz` or `.zst`), a `.parquet` file, or a
            folder saved by `datasets`. `hf:NAME[/CONFIG][@REVISION][:SPLIT]` is a dataset of the hub or a
            folder that `datasets.load_dataset` reads, `tfds:NAME[/CONFIG][:VERSION][:SPLIT]` one of TFDS.
            A split may be a part or a sum, `train[:10%]+test`; it is `train` if not given.
        unreadable: what becomes of a line that is no row; by default it is an error.

    Raises:
        ValueError: no such file or dataset, an ending that is not known, a line that is not a row.
    """
    text = str(name)
    if text.startswith("hf:"):
        return _hugging_face(text)
    if text.startswith("tfds:"):
        return _tfds(text)
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    rows = retried(read_file, path, unreadable)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


_PART = r"[A-Za-z_]\w*(?:\.\w+)*(?:\[[^\]]*\])?"  # train, train[:10], train[10%:20%]
_SPLIT = re.compile(rf"(?P<name>.*?)(?::(?P<split>{_PART}(?:\+{_PART})*))?", re.DOTALL)


def _named(text: str) -> tuple[str, str]:
    """What follows `hf:` or `tfds:`, and the split.

    >>> _named("hf:owner/name/main@v2:train[:10%]+test")
    ('owner/name/main@v2', 'train[:10%]+test')
    """
    name, split = _SPLIT.fullmatch(text.partition(":")[2]).group("name", "split")  # type: ignore[union-attr]
    if not name:
        raise ValueError(f"{text!r} names no dataset; hf:openai/gsm8k/main:train[:100] is one")
    return name, split or "train"


def _hugging_face(text: str) -> Source:
    name, split = _named(text)
    repository, config, revision = _repository(name)
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(repository, config, split=split, revision=revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{text}: {_one_line(error)}") from error
    return _ArrowRows(rows)


def _repository(name: str) -> tuple[str, str | None, str | None]:
    """A dataset of the hub or a folder, the name of its configuration, its revision.

    >>> _repository("openai/gsm8k/main@v1"), _repository("squad")
    (('openai/gsm8k', 'main', 'v1'), ('squad', None, None))
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), None, None
    if folder.parent != Path() and folder.parent.is_dir():
        return str(folder.parent), folder.name, None
    name, _, revision = name.partition("@")
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, revision or None


def _saved_dataset(path: Path) -> Source:
    try:
        dataset = _datasets().load_from_disk(str(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise ValueError(f"{path} has the splits {', '.join(dataset)}; give the folder of one")
        dataset = dataset["train"]
    return _ArrowRows(dataset)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this source needs the package datasets: pip install datasets") from error
    return datasets


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclasses.dataclass(frozen=True)
class _ArrowRows:
    """Rows of `datasets`, without what Arrow filled in."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Row:
        return without_filled(self.rows[index])


def _tfds(text: str) -> Source:
    """A split of TFDS through its array_record data source, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    name, split = _named(text)
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return _TfdsRows(tfds.builder_from_directory(folder).as_data_source(split))
        return _TfdsRows(tfds.data_source(name, split=split))
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{text}: {_one_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class _TfdsRows:
    """Rows of TFDS, as JSON has them."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Row:
        return _plain(self.rows[index])


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

"""Rows of a file: JSON lines, one JSON list, CSV, Parquet; text is UTF-8, whatever the locale."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainjax.text import whole

Row = Mapping[str, Any]

_WRAPPERS = ("data", "rows", "train")  # the one key of an object that holds a file's rows
_DELIMITERS = ",;\t"


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A line that is no row.

    Attributes:
        text: the line.
        error: why it is none, with the file and the line's number.
    """

    text: str
    error: ValueError


OnUnreadable = Callable[[Unreadable], Any]
"""`(line) -> row`: what stands in the place of a line that is no row, or an error."""


def refused(line: Unreadable) -> Any:
    """Raises the line's error."""
    raise line.error


def kept(line: Unreadable) -> Any:
    """The line itself, to be left out later: see `bad_rows.sound`."""
    return line


def read_file(path: Path, unreadable: OnUnreadable = refused) -> list[Any]:
    """The rows of a file, of the kind that its ending names.

    Args:
        path: `.jsonl`, `.ndjson`, `.json`, `.csv` or `.tsv` (each also `.gz` or `.zst`), or `.parquet`.
        unreadable: what becomes of a line that is no row; by default it is an error.

    Raises:
        ValueError: an ending that is not known; a file that cannot be read, or is not UTF-8.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    kind = endings[-2] if endings[-1:] and endings[-1] in (".gz", ".zst") and endings[:-1] else None
    kind = kind or (endings[-1] if endings else "")
    if kind == ".parquet":
        return _parquet(path)
    if kind not in _READERS:
        raise ValueError(
            f"{path}: cannot tell its format; a file ends in .jsonl, .json, .csv, .tsv (also .gz or "
            ".zst) or .parquet"
        )
    try:
        with _opened(path) as file:
            return list(_READERS[kind](path, file, unreadable))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except _damage(path) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _opened(path: Path) -> io.TextIOBase:
    """The text, without the byte-order mark that some programs write before it."""
    # The csv module asks for newlines as they are; json passes over them.
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", **how)
    if path.suffix.lower() == ".zst":
        return _zstandard(path).open(path, "rt", **how)
    return path.open(**how)


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """What the readers of a file raise where it is damaged or cannot be read."""
    zstd = (_zstandard(path).ZstdError,) if path.suffix.lower() == ".zst" else ()
    return OSError, EOFError, zlib.error, *zstd


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path} needs the package zstandard: pip install zstandard") from error
    return zstandard


def _json_lines(path: Path, file: io.TextIOBase, unreadable: OnUnreadable) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield _object(_json(line), f"{path}, line {number}")
        except ValueError as error:
            text = line.rstrip("\r\n")
            why = _not_a_line(path, number, text, error)
            yield unreadable(Unreadable(text, why))


def _not_a_line(path: Path, number: int, text: str, error: ValueError) -> ValueError:
    """Why a line is no row, as one sentence."""
    if not isinstance(error, json.JSONDecodeError):
        return error
    why = f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})"
    return ValueError(why + _SEVERAL_LINES.get(text.strip(), ""))


_SEVERAL_LINES = {
    "{": "; it looks like an object over several lines: write each row on one line",
    "[": "; it looks like a list over several lines: name the file .json",
}


def _one_json(path: Path, file: io.TextIOBase, unreadable: OnUnreadable) -> Iterator[Any]:
    """Rows of one JSON value; of JSON lines where the file holds several."""
    text = file.read()
    try:
        value = _json(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().partition("\n")[0]
        if error.msg == "Extra data" or _is_object(first):
            yield from _json_lines(path, io.StringIO(text), unreadable)
            return
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    for number, row in enumerate(_rows_in(value)):
        yield _object(row, f"{path}, item {number}")


def _rows_in(value: Any) -> list[Any]:
    """The rows of a JSON value: a list, `{"data": [...]}` around one, or the value as the only row."""
    if isinstance(value, dict) and len(value) == 1:
        ((name, inner),) = value.items()
        if name in _WRAPPERS and isinstance(inner, list):
            return inner
    return value if isinstance(value, list) else [value]


def _is_object(text: str) -> bool:
    try:
        return isinstance(_json(text), dict)
    except ValueError:
        return False


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is an object, this is a {type(row).__name__}")
    return row


def _json(text: str) -> Any:
    """The value, its strings without halves of surrogate pairs, which JSON can spell."""
    value = json.loads(text)
    return _whole(value) if "\\ud" in text or "\\uD" in text else value


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _csv(path: Path, file: io.TextIOBase, unreadable: OnUnreadable) -> Iterator[Any]:
    """Rows by the names in the first line, which also tells the delimiter: a comma, `;` or a tab."""
    start = file.readline()
    delimiter = max(_DELIMITERS, key=start.count)
    reader = csv.reader(itertools.chain([start], file), delimiter=delimiter, strict=True)
    with _fields_of_any_length():
        try:
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{path}, line 1: two columns are called {twice[0]!r}")
            for fields in filter(None, reader):
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                    continue
                why = (
                    f"{path}, line {reader.line_num}: {_count(fields)}, where the first line names "
                    f"{_count(header)}"
                )
                yield unreadable(Unreadable(delimiter.join(fields), ValueError(why)))
        except csv.Error as error:
            # After a quote that stays open all of the file is one field: no row is left to go on with.
            raise ValueError(
                f"{path}, line {reader.line_num}: not valid CSV: {error}; a field with quotes in it is "
                "quoted, and they are doubled"
            ) from error


@contextlib.contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lifts the csv module's limit of 128 KiB, which is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _count(fields: Sequence[str]) -> str:
    return f"{len(fields)} field{'' if len(fields) == 1 else 's'}"


_READERS: Mapping[str, Callable[[Path, io.TextIOBase, OnUnreadable], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _one_json,
    ".csv": _csv,
    ".tsv": _csv,
}


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable Parquet file: {reason}") from error
    return [without_filled(row) for row in rows]


def without_filled(row: Row) -> Row:
    """A row of Arrow's without what it filled in.

    A struct of Arrow's has every field that any row has, None where a row had none. A template would write
    these: a call's arguments `{"town": "Bern"}` came back with the other tools' arguments as nulls. So
    fields that are None are left out of objects within a row; a column of the row itself stays.

    >>> without_filled({"margin": None, "calls": [{"town": "Bern", "a": None}]})
    {'margin': None, 'calls': [{'town': 'Bern'}]}
    """
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list | tuple) else value

"""Rows that cannot be read, told apart from those that can before any of them is made into tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trainjax.data.encode import at_row
from trainjax.data.files import Row, Unreadable
from trainjax.data.formats import supervised_reader
from trainjax.data.groups import Read
from trainjax.data.render import render, renderings
from trainjax.data.sources import Source


class BadRow(NamedTuple):
    """A row that cannot be read.

    Attributes:
        number: of the row in the source.
        reason: one sentence.
        row: as it is there; of a line that is no row, its text.
    """

    number: int
    reason: str
    row: Any


@dataclasses.dataclass(frozen=True)
class Sound:
    """The rows of a source that can be read.

    Attributes:
        source: all rows.
        numbers: those that are kept.
    """

    source: Source
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Row:
        return self.source[self.numbers[index]]


Check = Callable[[Any], Any]
"""`(row)`: raises where a row cannot be read."""


def as_text(tokenizer: Any, *, template: bool = True) -> Check:
    """Reads rows as `encode` does: all by the columns of the first that can be read."""
    found: list[Any] = []

    def check(row: Any) -> None:
        read = found[0] if found else supervised_reader(list(row))
        renderings(read(row), tokenizer, template=template)
        found[:] = [read]

    return check


def as_group(read: Read, tokenizer: Any, *, template: bool = True) -> Check:
    """Reads rows as `encode_groups` does, each without the others."""

    def check(row: Any) -> None:
        group = read([row], 0)
        for one in group.completions if group is not None else ():
            render(one, tokenizer, template=template)

    return check


def columns(source: Source) -> set[str]:
    """The columns of the first row that is one."""
    rows = (source[number] for number in range(len(source)))
    return set(next((row for row in rows if not isinstance(row, Unreadable)), {}))


def sound(source: Source, check: Check) -> tuple[Sound, list[BadRow]]:
    """The rows that pass, and why the others do not.

    Args:
        source: rows; `Unreadable` lines among them are bad rows.
        check: `as_text(...)` or `as_group(...)`.

    Raises:
        ValueError: no row passes; the message says why the first does not.
    """
    kept, bad = [], []
    for number in range(len(source)):
        row = source[number]
        try:
            at_row(number, _checked, check, row)
            kept.append(number)
        except (ValueError, TypeError, AttributeError) as error:
            bad.append(BadRow(number, str(error), row.text if isinstance(row, Unreadable) else row))
    if not kept:
        raise ValueError(f"none of the {len(source)} rows can be read: {bad[0].reason}")
    return Sound(source, kept), bad


def _checked(check: Check, row: Any) -> None:
    if isinstance(row, Unreadable):
        raise row.error
    check(row)

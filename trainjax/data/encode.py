"""From rows to token ids with their loss mask, once, kept flat in memory."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from trainjax.data.formats import supervised_reader
from trainjax.data.render import Rendered, renderings
from trainjax.data.sources import Source
from trainjax.data.tokens import tokenized

_CHUNK = 1024  # rows tokenized at once: enough for the tokenizer's threads

TooLong = Callable[[int, int], int | None]
"""`(length, max_length) -> how many tokens to keep`, None to drop the row."""


def truncate(length: int, max_length: int) -> int | None:
    """Keeps the first `max_length` tokens of a longer row."""
    return min(length, max_length)


def drop(length: int, max_length: int) -> int | None:
    """Leaves a longer row out."""
    return length if length <= max_length else None


def refuse(length: int, max_length: int) -> int | None:
    """Stops at a longer row."""
    if length > max_length:
        raise ValueError(f"{length} tokens are more than max_length={max_length}")
    return length


@dataclasses.dataclass(frozen=True)
class Groups:
    """Several completions of a prompt as one example, each a segment of its own.

    Attributes:
        size: completions of an example, of the one that has most.
        branches: the completion that a token belongs to, 1, 2, ...; 0 for a prompt that all share.
        targets: the tokens of completions.
        values: numbers of each example by name, `[examples]` or `[examples, size]`.
    """

    size: int
    branches: Int[np.ndarray, " tokens"]
    targets: Bool[np.ndarray, " tokens"]
    values: Mapping[str, np.ndarray]

    @property
    def shares_prompts(self) -> bool:
        """Whether any prompt is there once for several completions."""
        return not self.branches.all()


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenized rows.

    Attributes:
        tokens: ids of all rows, one after another.
        trained: which of them are targets.
        offsets: where each row starts; one more than rows.
        rows: number of the row in the source that each is of; a row may be several examples.
        truncated: how many were cut at `max_length`.
        too_long: how many were left out because they were longer than `max_length`.
        without_target: how many were left out because no target was left in them.
        incomparable: rows left out because nothing in them can be compared: two equal completions,
            or an empty one.
        unwritten: answers that are not targets because the chat template does not write them, as one
            that knows no tools leaves their calls out.
        tools_ignored: rows whose tools the chat template does not describe.
        groups: where examples are several completions each; `trained` is then of the best ones.
        reference: log-probability of each token under a reference, where they were computed.
    """

    tokens: Int[np.ndarray, " tokens"]
    trained: Bool[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " examples_and_1"]
    rows: Int[np.ndarray, " examples"]
    truncated: int = 0
    too_long: int = 0
    without_target: int = 0
    incomparable: int = 0
    unwritten: int = 0
    tools_ignored: int = 0
    groups: Groups | None = None
    reference: Float[np.ndarray, " tokens"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @functools.cached_property
    def targets(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example that are trained on."""
        return np.add.reduceat(self.trained.astype(np.int64), self.offsets[:-1])

    def summary(self) -> str:
        """One line of what there is, and what was cut or left out."""
        targets = self.trained if self.groups is None else self.groups.targets
        parts = [
            f"{len(self)} examples, {len(self.tokens)} tokens, {targets.mean():.0%} trained on"
        ]
        notes = {
            "cut to the longest length": self.truncated,
            "left out as too long": self.too_long,
            "left out: no completion within that length": self.without_target,
            "left out: completions that are equal, or an empty one": self.incomparable,
            "not trained on: answers that the chat template does not write": self.unwritten,
            "with tools that the chat template does not describe": self.tools_ignored,
        }
        return "; ".join([*parts, *(f"{count} {note}" for note, count in notes.items() if count)])

    def fingerprint(self) -> str:
        """Eight hex digits of all tokens and masks."""
        arrays = [self.tokens, self.trained, self.offsets]
        if self.groups is not None:
            arrays += [self.groups.branches, self.groups.targets, *self.groups.values.values()]
        return f"{functools.reduce(lambda sum_, a: zlib.crc32(a.tobytes(), sum_), arrays, 0):08x}"

    def slice_of(self, example: int) -> slice:
        """Where an example's tokens are."""
        return slice(self.offsets[example], self.offsets[example + 1])


def encode(
    source: Source,
    tokenizer: Any,
    max_length: int,
    *,
    template: bool = True,
    too_long: TooLong = truncate,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Token ids and loss masks of all rows.

    A target is a token of a trained span, and no token reaches over a span's beginning or end: where the
    tokenizer would join the prompt's last characters with the completion's first, each is tokenized by
    itself, as generation tokenizes the prompt that it is given. The first token of a row is nobody's
    target. Text without a template gets the tokenizer's own beginning token, if it adds one and the
    text does not begin with it, and the end-of-sequence token as a last target.

    A conversation is one example, but where its chat template writes earlier turns differently once
    later ones follow: then each turn that is not in a later one's text is an example of its own.

    Args:
        source: rows; see `formats.FORMATS` for their columns.
        tokenizer: a `PreTrainedTokenizerFast`.
        max_length: longest example, in tokens.
        template: whether plain prompts and completions go through the chat template.
        too_long: `truncate`, `drop` or `refuse`.
        progress: called with the number of rows done.

    Raises:
        ValueError: unknown columns, a row that cannot be read (by number), no target in any row.
    """
    pieces: list[tuple[np.ndarray, np.ndarray, int]] = []
    counts: Counter[str] = Counter()
    for numbers, rendered in _rendered_chunks(source, tokenizer, template):
        for number, text, (ids, trained) in zip(
            numbers, rendered, tokenized(rendered, tokenizer), strict=True
        ):
            counts += noted(text)
            keep = at_row(number, too_long, len(ids), max_length)
            if keep is None:
                counts["too_long"] += 1
            elif not trained[:keep].any():
                counts["without_target"] += 1
            else:
                counts["truncated"] += keep < len(ids)
                pieces.append((ids[:keep], trained[:keep], number))
        progress(numbers[-1] + 1)
    if not pieces:
        raise ValueError(
            f"none of the {len(source)} rows has a token to train on: every completion is empty, or "
            f"lies beyond max_length={max_length}"
        )
    ids, trained, rows = zip(*pieces, strict=True)
    offsets = np.cumsum([0, *map(len, ids)])
    tally: dict[str, Any] = dict(counts)
    return Examples(
        np.concatenate(ids), np.concatenate(trained), offsets, np.asarray(rows), **tally
    )


def noted(text: Rendered) -> Counter[str]:
    """What `Examples` counts of a text as it was rendered."""
    return Counter(unwritten=text.unwritten, tools_ignored=int(text.tools_ignored))


def _rendered_chunks(
    source: Source, tokenizer: Any, template: bool
) -> Iterator[tuple[list[int], list[Rendered]]]:
    """Texts, and the number of the row that each is of, some rows at a time."""
    if not len(source):
        raise ValueError("the dataset is empty")
    read = at_row(0, lambda: supervised_reader(list(source[0])))

    def texts(number: int) -> list[Rendered]:
        return renderings(read(source[number]), tokenizer, template=template)

    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        chunk = [(number, text) for number in rows for text in at_row(number, texts, number)]
        yield [number for number, _ in chunk], [text for _, text in chunk]


def at_row(number: int, f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)`, with the row's number in the message of its errors."""
    try:
        return f(*args)
    except KeyError as error:
        raise ValueError(f"row {number}: the column {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error

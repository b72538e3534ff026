"""Several completions of one prompt, to be compared: pairs, labelled completions, scored lists.

A row becomes a group of segments in one row of the batch. The prompt's tokens may be there once, for
all completions to see, instead of once for each: `[prompt | chosen | rejected]`. So that a completion's
first token is predicted inside its own segment, the prompt's last token begins each completion.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from trainjax.data.comparisons import compared, is_empty, joined
from trainjax.data.encode import Examples, Groups, TooLong, at_row, noted, truncate
from trainjax.data.formats import FORMATS as TEXTS
from trainjax.data.formats import Conversation, Text, completion, detect, introduced
from trainjax.data.render import Rendered, render
from trainjax.data.sources import Source
from trainjax.data.tokens import tokenized

_CHUNK = 512  # rows tokenized at once: enough for the tokenizer's threads


class Group(NamedTuple):
    """A row as it was read.

    Attributes:
        completions: each with the prompt.
        best: which one supervised fine-tuning would train on; None for none of them.
        values: numbers that the loss reads: `margins`, `labels`, or `scores` of each completion.
    """

    completions: Sequence[Conversation | Text]
    best: int | None = 0
    values: Mapping[str, Any] = {}


NOTHING = Group((), None)
"""A row in which nothing can be compared: a completion is empty, or both of a pair are the same."""

Read = Callable[[Source, int], Group]
"""`(source, number) -> group`: of a row, which may look at others."""


def pair(source: Source, number: int) -> Group:
    """`chosen` and `rejected` with a `prompt`, or as conversations or texts that begin alike.

    A `margin` says by how much the chosen one is the better: all rows have one, or none.
    """
    row = source[number]
    prompt, chosen, rejected = compared(row)
    if chosen == rejected or is_empty(chosen) or is_empty(rejected):
        return NOTHING
    values = {} if row.get("margin") is None else {"margins": _number(row, "margin")}
    return Group([joined(prompt, answer, row) for answer in (chosen, rejected)], 0, values)


def single(source: Source, number: int) -> Group:
    """A text by itself, in any format of supervised fine-tuning: a group of one, to be scored."""
    row = source[number]
    read = detect(list(row), TEXTS)
    if read is completion and is_empty(row["completion"]):
        raise ValueError(f"a completion is empty: {row['completion']!r}")
    return Group([introduced(read(row), row)])


def labelled(source: Source, number: int) -> Group:
    """`completion` with a `label`: true if it is desirable. Beside it, another row's completion.

    What another prompt's completion gains over the reference measures how far the policy has drifted
    (KTO's baseline). It is the next row's that is not empty, and the last has the first's.
    """
    row = source[number]
    label = _label(row["label"])
    if is_empty(row["completion"]):
        return NOTHING
    next_ = _answered(source, number)
    own = joined(row["prompt"], row["completion"], row)
    beside = at_row(next_, joined, row["prompt"], source[next_]["completion"], row)
    return Group([own, beside], 0 if label else None, {"labels": float(label)})


def _label(value: Any) -> bool:
    """True or false as JSON, numbers, and a spreadsheet's words have it."""
    found = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool | np.bool_) and found not in (0, 1):
        raise ValueError(f"`label` is true or false, this is {value!r:.60}")
    return bool(found)


_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _answered(source: Source, number: int) -> int:
    """The next row after this one whose completion is not empty; this one at the latest."""
    others = (i % len(source) for i in range(number + 1, number + 1 + len(source)))
    return next(i for i in others if not at_row(i, lambda i=i: is_empty(source[i]["completion"])))


def scored(source: Source, number: int) -> Group:
    """`completions` with a number each in `scores`."""
    row = source[number]
    answers, scores = row["completions"], [float(score) for score in row["scores"]]
    if len(answers) != len(scores) or len(answers) < 2:
        raise ValueError(
            f"{len(answers)} `completions` with {len(scores)} `scores`: two or more, a score each"
        )
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"`scores` are finite numbers, these are {scores}")
    if any(map(is_empty, answers)):
        return NOTHING
    made = [joined(row["prompt"], answer, row) for answer in answers]
    return Group(made, int(np.argmax(scores)), {"scores": scores})


FORMATS: Mapping[tuple[str, ...], Read] = {
    ("chosen", "rejected"): pair,
    ("prompt", "completion", "label"): labelled,
    ("prompt", "completions", "scores"): scored,
}
"""The columns of each known format, and how its rows are read."""


def encode_groups(
    source: Source,
    tokenizer: Any,
    max_length: int,
    *,
    read: Read | None = None,
    share_prompt: bool = True,
    template: bool = True,
    too_long: TooLong = truncate,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Token ids, segments and masks of rows with several completions each.

    Args:
        source: rows; see `FORMATS` for their columns.
        tokenizer: a `PreTrainedTokenizerFast`.
        max_length: longest prompt with one of its completions, in tokens.
        read: `pair`, `labelled`, `scored` or `single`; by default what the columns say.
        share_prompt: the prompt's tokens once for all completions. A model with a sliding window
            cannot have it.
        template: whether plain prompts and completions go through the chat template.
        too_long: `truncate`, `drop` or `refuse`.
        progress: called with the number of rows done.

    Raises:
        ValueError: unknown columns; a row that cannot be read (by number): scores or margins that are
            not numbers, or only of some rows; no group whose completions all have a token.
    """
    if not len(source):
        raise ValueError("the dataset is empty")
    read = at_row(0, lambda: detect(list(source[0]), FORMATS)) if read is None else read
    made: list[_Laid] = []
    counts: Counter[str] = Counter()
    for number, group, texts, answers in _tokenized(source, tokenizer, read, template, progress):
        counts += sum(map(noted, texts), Counter())
        kept = [at_row(number, too_long, len(ids), max_length) for ids, _ in answers]
        cut = [
            (ids[:keep], trained[:keep]) for (ids, trained), keep in zip(answers, kept, strict=True)
        ]
        if not texts:
            counts["incomparable"] += 1
        elif None in kept:
            counts["too_long"] += 1
        elif not all(trained.any() for _, trained in cut):
            counts["without_target"] += 1
        else:
            counts["truncated"] += any(
                keep < len(ids) for (ids, _), keep in zip(answers, kept, strict=True)
            )
            made.append(_laid_out(cut, group, number, share_prompt))
    if counts["incomparable"] == len(source):
        raise ValueError(
            f"none of the {len(source)} rows can be compared: its completions are equal, or one is empty"
        )
    if not made:
        raise ValueError(
            f"none of the {len(source)} rows has a token to compare in each of its completions within "
            f"max_length={max_length}"
        )
    tally: dict[str, Any] = dict(counts)
    return dataclasses.replace(_joined(made), **tally)


class _Laid(NamedTuple):
    """A group's tokens, one segment after another."""

    tokens: Int[np.ndarray, " tokens"]
    branches: Int[np.ndarray, " tokens"]  # 0: the prompt that they share; 1, 2, ...: a completion's
    targets: Bool[np.ndarray, " tokens"]
    group: Group
    row: int


def _laid_out(
    answers: Sequence[tuple[np.ndarray, np.ndarray]], group: Group, row: int, share: bool
) -> _Laid:
    shared = _num_shared(answers) if share else 0
    (first, _), *_ = answers
    tokens = [first[:shared], *(ids[shared:] for ids, _ in answers)]
    branches = [np.full(len(part), number, np.int32) for number, part in enumerate(tokens)]
    targets = [np.zeros(shared, bool), *(trained[shared:] for _, trained in answers)]
    flat = [np.concatenate(parts) for parts in (tokens, branches, targets)]
    return _Laid(flat[0], flat[1], flat[2], group, row)


def _num_shared(answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """Tokens that all begin with, but for the one that predicts the first target of any."""
    most = max(0, min(int(np.argmax(trained)) for _, trained in answers) - 1)
    differs = np.any([ids[:most] != answers[0][0][:most] for ids, _ in answers], axis=0)
    return int(np.argmax(differs)) if differs.any() else most


def _joined(made: Sequence[_Laid]) -> Examples:
    size = max(len(one.group.completions) for one in made)
    sft = [
        one.targets & (one.branches == (-1 if one.group.best is None else one.group.best + 1))
        for one in made
    ]
    names = made[0].group.values.keys()
    if odd := [one for one in made if one.group.values.keys() != names]:
        raise ValueError(
            f"row {made[0].row} comes with {', '.join(names) or 'no numbers'}, row {odd[0].row} with "
            f"{', '.join(odd[0].group.values) or 'none'}; give them in all rows or in none"
        )
    values = {
        name: np.asarray([_padded(one.group.values[name], size) for one in made], np.float32)
        for name in names
    }
    groups = Groups(
        size,
        np.concatenate([one.branches for one in made]),
        np.concatenate([one.targets for one in made]),
        values,
    )
    return Examples(
        np.concatenate([one.tokens for one in made]),
        np.concatenate(sft),
        np.cumsum([0, *(len(one.tokens) for one in made)]),
        np.asarray([one.row for one in made]),
        groups=groups,
    )


def _padded(value: Any, size: int) -> Any:
    return [*value, *([0.0] * (size - len(value)))] if isinstance(value, list) else value


def _tokenized(
    source: Source, tokenizer: Any, read: Read, template: bool, progress: Callable[[int], None]
) -> Iterator[tuple[int, Group, list[Rendered], list[tuple[np.ndarray, np.ndarray]]]]:
    for start in range(0, len(source), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(source)))
        groups = [at_row(number, read, source, number) for number in numbers]
        rendered = [
            at_row(number, _rendered, group, tokenizer, template)
            for number, group in zip(numbers, groups, strict=True)
        ]
        answers = tokenized([text for texts in rendered for text in texts], tokenizer)
        for number, group, texts in zip(numbers, groups, rendered, strict=True):
            yield number, group, texts, [next(answers) for _ in texts]
        progress(numbers.stop)


def _rendered(group: Group, tokenizer: Any, template: bool) -> list[Rendered]:
    return [render(one, tokenizer, template=template) for one in group.completions]


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` is a finite number, this is {value!r:.60}")
    return number

"""Rows of a run: opened, made into tokens with a word about them, and how long a row of a batch is."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainjax import axes, data, parallel
from trainjax.data import bad_rows
from trainjax.io import folder
from trainjax.models import Model
from trainjax.recipes import _common as common
from trainjax.recipes._common import say
from trainjax.recipes._configs import StepConfig, TrainConfig


def opened(config: TrainConfig) -> list[tuple[str, data.Source]]:
    """The rows of `--data` and, if there is one, of `--eval-data`, each after the flag's value."""
    names = [config.data] if config.eval_data is None else [config.data, config.eval_data]
    return [(name, data.read(name, common.BAD_ROWS[config.bad_rows])) for name in names]


def encode(
    config: StepConfig,
    name: str,
    rows: data.Source,
    model: Model,
    read: data.Read | None = None,
) -> data.Examples:
    """Tokens and masks of the rows that a flag named, and a word about them.

    Raises:
        ValueError: rows that cannot be read, with their file's name; a tokenizer of another model.
    """
    too_long, encoder = common.TOO_LONG[config.too_long], data.encode
    if read is not None:
        share = model.config.window is None
        encoder = functools.partial(data.encode_groups, read=read, share_prompt=share)
    with common.naming(name):
        check = checking(read, model.tokenizer, config.template)
        rows, numbers = kept(config.bad_rows, name, rows, check, config.out / "dropped.jsonl")
        examples = encoder(
            rows, model.tokenizer, config.max_length, template=config.template, too_long=too_long
        )
        examples = dataclasses.replace(examples, rows=numbers[examples.rows])
    if (largest := int(examples.tokens.max())) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model.source} gives the token {largest}, but the model's "
            f"vocab_size={model.config.vocab_size}; they are not of one model"
        )
    say(examples.summary())
    limit = model.config.max_length
    if beyond := int((text_lengths(examples) > limit).sum()):
        say(
            f"warning: {beyond} of the {len(examples)} examples are longer than the {limit} tokens that "
            f"{model.source} was made for (max_position_embeddings); --max-length {limit} cuts them"
        )
    return examples


def checking(read: data.Read | None, tokenizer: Any, template: bool) -> bad_rows.Check:
    """How a row is tried: as a group of completions that `read` makes, or without it as one text."""
    if read is None:
        return bad_rows.as_text(tokenizer, template=template)
    return bad_rows.as_group(read, tokenizer, template=template)


def kept(
    how: common.BadRowsName,
    name: str,
    rows: data.Source,
    check: bad_rows.Check,
    dropped: Path | None = None,
) -> tuple[data.Source, np.ndarray]:
    """The rows that can be read where `--bad-rows drop` asks for them, and their numbers; else all.

    Args:
        how: error or drop.
        name: of the rows.
        rows: all of them.
        check: `bad_rows.as_text(...)` or `bad_rows.as_group(...)`.
        dropped: a file for what is left out, JSON lines; None to say each.

    Raises:
        ValueError: none can be read.
    """
    if how == "error":
        return rows, np.arange(len(rows))
    sound, bad = bad_rows.sound(rows, check)
    if bad:
        say(
            f"{name}: {len(bad)} of {len(rows)} rows cannot be read and are left out{_where(dropped)}"
        )
    for row in bad[:1] if dropped is not None else bad:
        say(row.reason)
    if bad and dropped is not None:
        _write_dropped(dropped, name, bad)
    return sound, np.asarray(sound.numbers)


def _where(dropped: Path | None) -> str:
    return "" if dropped is None else f", into {dropped}; the first:"


def _write_dropped(path: Path, name: str, bad: Sequence[bad_rows.BadRow]) -> None:
    """Writes what was left out of rows of that name; what was left out of others stays in the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["data"] != name]
    for row in bad:
        told = {"data": name, "row": row.number, "reason": row.reason, "content": row.row}
        lines.append(json.dumps(told, default=str))
    if parallel.is_first():
        with folder.replaced(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def text_lengths(examples: data.Examples) -> np.ndarray:
    """Tokens of the longest text in each example: of a group, the prompt with the longest completion."""
    if examples.groups is None:
        return examples.lengths
    branches = [examples.groups.branches[examples.slice_of(i)] for i in range(len(examples))]
    counts = [np.bincount(branch) for branch in branches]  # the first is of the shared prompt
    return np.asarray([count[0] + count[1:].max() for count in counts])


def row_length(
    pack: data.Pack,
    max_length: int,
    found: Sequence[data.Examples],
    mesh: jax.sharding.Mesh | None = None,
) -> int:
    """Tokens of every row of a run: `max_length`, or less where no row can be as full as that."""
    capacity = max(data.row_length(examples, max_length) for examples in found)
    fullest = max(data.fullest(pack, examples.lengths, capacity) for examples in found)
    multiple = math.lcm(64, axes.length(mesh, "sequence"))
    return min(capacity, -(-fullest // multiple) * multiple)

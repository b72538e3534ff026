"""See what a model would be trained on: a batch with its targets coloured, packing, lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainjax import data
from trainjax.io.hub import open_checkpoint
from trainjax.recipes import _common as common
from trainjax.recipes._rows import checking, kept, row_length

_TARGET, _PADDING = "bold black on green", "dim"


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints one batch as training sees it: targets in green, the rest plain, padding counted."""

    data: tyro.conf.Positional[str]
    """Rows: a file, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    model: str
    """Whose tokenizer and chat template are used; its weights are not loaded."""
    rows: int = 4
    """Rows of the batch to print."""
    batch_size: int = 8
    """Rows of a batch."""
    max_length: int = 512
    """Tokens of a row."""
    packing: common.PackingName = "best-fit"
    """Several examples a row, or one."""
    too_long: common.TooLongName = "truncate"
    """What happens to an example longer than --max-length."""
    bad_rows: common.BadRowsName = "error"
    """What happens to a row that cannot be read: it is told, or left out and counted."""
    template: bool = True
    """Put plain prompts and completions into the chat template."""
    seed: int = 0
    """Random seed of the order of rows."""


def main(config: Config) -> None:
    """Runs the job."""
    tokenizer = open_checkpoint(config.model).tokenizer()
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    too_long = common.TOO_LONG[config.too_long]
    rows = data.read(config.data, common.BAD_ROWS[config.bad_rows])
    with common.naming(config.data):
        check = checking(None, tokenizer, config.template)
        rows, numbers = kept(config.bad_rows, config.data, rows, check)
        examples = data.encode(
            rows, tokenizer, config.max_length, template=config.template, too_long=too_long
        )
    examples = dataclasses.replace(examples, rows=numbers[examples.rows])
    pack = common.PACKING[config.packing]
    length = row_length(pack, config.max_length, [examples])
    plan = data.Plan(config.batch_size, length, pack, config.seed)
    console = Console()
    marks = ("", "") if console.is_terminal and not console.no_color else ("«", "»")
    batch = data.fill(examples, plan, plan.epoch(examples, 0)[0])
    for row in _rows(batch, tokenizer, config.rows, marks):
        console.print(row)
        console.rule()
    legend = Text("green" if marks == ("", "") else "«between these»", _TARGET)
    console.print(legend + Text(" is trained on; ⏎ ends an example"))
    console.print(_packing(examples, plan))
    console.print(_histogram(examples.lengths))


def _rows(
    batch: dict[str, np.ndarray], tokenizer: Any, count: int, marks: tuple[str, str]
) -> Iterator[Text]:
    for tokens, weights, sources in list(
        zip(batch["tokens"], batch["weights"], batch["rows"], strict=True)
    )[:count]:
        text = Text()
        for start, stop in _runs(sources):
            if sources[start] < 0:
                text.append(f"[{stop - start} of padding]", _PADDING)
                continue
            text.append(f"[row {sources[start]}] ", _PADDING)
            for first, last in _runs(weights[start:stop] > 0):
                piece = tokenizer.decode(tokens[start + first : start + last])
                if weights[start + first] > 0:
                    text.append(piece.join(marks), _TARGET)
                else:
                    text.append(piece)
            text.append("⏎\n", _PADDING)
        yield text


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    edges = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    return list(zip([0, *edges], [*edges, len(values)], strict=True))


def _packing(examples: data.Examples, plan: data.Plan) -> str:
    batches = plan.epoch(examples, 0)
    rows = sum(len(batch.rows) for batch in batches)
    slots = sum(len(batch.rows) * batch.length for batch in batches)
    return (
        f"{examples.summary()}\n{len(batches)} batches of {plan.batch_size} rows an epoch, "
        f"{len(examples) / rows:.1f} examples a row, {len(examples.tokens) / slots:.1%} of the slots filled"
    )


def _histogram(lengths: np.ndarray, bins: int = 10, width: int = 40) -> Table:
    first, last = int(lengths.min()), int(lengths.max())
    step = -(-(last + 1 - first) // bins)
    edges = np.arange(first, last + step + 1, step)
    counts, _ = np.histogram(lengths, edges)
    table = Table("tokens", "examples", "", box=None, title="lengths", title_justify="left")
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(width * count / counts.max())
        table.add_row(f"{low}" if step == 1 else f"{low} to {high - 1}", str(count), bar)
    return table

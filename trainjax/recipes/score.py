"""Score completions with a reward model; of pairs also how often it is right, and how honest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainjax import data, evals
from trainjax.data import bad_rows
from trainjax.io import folder
from trainjax.models import Model, check_tokens
from trainjax.recipes import _common as common
from trainjax.recipes._common import MeshConfig, say
from trainjax.recipes._rows import checking, kept
from trainjax.scorers import scorer

COLUMNS: Mapping[data.Read, tuple[str, ...]] = {
    data.pair: ("chosen_score", "rejected_score"),
    data.single: ("score",),
}
"""What rows of each kind get."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Writes rows with their scores: `chosen_score` and `rejected_score` of a pair, else `score`."""

    model: str
    """A reward model's folder, or with --adapter the base of one."""
    data: str
    """Rows: pairs, prompts with completions, or messages; a file, hf:NAME[:SPLIT] or tfds:NAME[:SPLIT]."""
    out: Path
    """File to write, JSON lines; it must not exist yet."""
    adapter: Path | None = None
    """A reward model's adapter in PEFT's format, or the folder of the run that made it."""
    other_base: bool = False
    """Accept an adapter that was trained on another base of the same shape."""
    batch_size: int = 8
    """Rows of a batch, over all devices."""
    max_length: int = 1024
    """Tokens of a prompt with a completion. A longer one is an error: cut, it would be another text."""
    dtype: common.DtypeName | None = None
    """Dtype of weights and arithmetic; by default as stored, and what the platform is fast at."""
    bad_rows: common.BadRowsName = "error"
    """What happens to a row that cannot be read: the job ends, or it is left out, into OUT.dropped.jsonl."""
    template: bool = True
    """Put plain prompts and completions into the chat template."""
    mesh: MeshConfig = MeshConfig()


def main(config: Config) -> None:
    """Runs the job."""
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; give the name of a new file")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    rows, mesh = data.read(config.data, common.BAD_ROWS[config.bad_rows]), config.mesh.mesh()
    read = data.pair if {"chosen", "rejected"} & bad_rows.columns(rows) else data.single
    model, method, params = common.load_scorer(
        config.model,
        dtype=config.dtype,
        adapter=config.adapter,
        other_base=config.other_base,
        mesh=mesh,
    )
    dropped = config.out.with_name(f"{config.out.name}.dropped.jsonl")
    with common.naming(config.data):
        check = checking(read, model.tokenizer, config.template)
        rows, _ = kept(config.bad_rows, config.data, rows, check, dropped)
    examples = _encoded(config, rows, read, model)
    length = data.row_length(examples, config.max_length)
    plan = data.Plan(config.batch_size, length, data.unpacked)
    ours = scorer(model, method, len(COLUMNS[read]))
    scores = evals.scores(ours, params, examples, plan, mesh)
    _check_finite(scores, examples.rows, str(config.adapter or config.model))
    with folder.replaced(config.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in _with_scores(rows, examples.rows, scores, COLUMNS[read]):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    say(f"{len(examples)} rows with scores are in {config.out}")
    if read is data.pair and scores.ndim == 2:  # of several objectives none is the better alone
        _print_report(evals.comparisons(scores[:, 0], scores[:, 1]), len(examples))


def _encoded(config: Config, rows: data.Source, read: data.Read, model: Model) -> data.Examples:
    if model.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    with common.naming(config.data):
        examples = data.encode_groups(
            rows,
            model.tokenizer,
            config.max_length,
            read=read,
            share_prompt=model.config.window is None,
            template=config.template,
            too_long=data.refuse,
        )
    check_tokens(model.config, examples.tokens)
    if missing := sorted(set(range(len(rows))) - set(examples.rows.tolist())):
        raise ValueError(
            f"{config.data}: row {missing[0]}: nothing to score: no completion, an empty one, or two that "
            "are equal"
        )
    return examples


def _check_finite(scores: np.ndarray, numbers: np.ndarray, model: str) -> None:
    bad = numbers[~np.isfinite(scores).reshape(len(scores), -1).all(axis=1)]
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(scores)} rows have a score that is not a finite number, row {bad[0]} first: "
            f"the weights of {model} are damaged, or too large for --dtype"
        )


def _with_scores(
    rows: data.Source, numbers: np.ndarray, scores: np.ndarray, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for number, own in zip(numbers.tolist(), scores.tolist(), strict=True):
        yield {**rows[number], **dict(zip(columns, own, strict=True))}


def _print_report(found: evals.Comparisons, pairs: int) -> None:
    print(
        f"accuracy {found.accuracy:.3f}, margin {found.margin:.3f}, calibration error (ECE) "
        f"{found.calibration_error:.3f}, Brier score {found.brier:.3f} on {pairs} pairs"
    )

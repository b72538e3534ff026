"""Exact match: the share of answers that are the reference, letter by letter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainjax.models import Model
from trainjax.rollout import generate, prompt_ids


class ExactMatch(NamedTuple):
    """How many answers were right.

    Attributes:
        score: share of right answers, from 0 to 1.
        by_task: the same for each value of the rows' `task`.
        answers: what the model said, row by row.
    """

    score: float
    by_task: dict[str, float]
    answers: list[str]


def exact_match(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> ExactMatch:
    """Answers each conversation greedily and compares with its last message, outer spaces aside.

    Args:
        model: with a tokenizer that has a chat template.
        rows: dicts with `messages`, the last of which is the right answer; `task` is optional.
        max_new_tokens: longest answer; one cut there is compared as it is.
        batch_size: questions at once.
    """
    if not rows:
        raise ValueError("there are no rows to evaluate on")
    asked = [prompt_ids(model.tokenizer, row["messages"][:-1]) for row in rows]
    found = generate(model, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = [completion.text for completion in found]
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        right[row.get("task", "")].append(answer.strip() == row["messages"][-1]["content"].strip())
    total = sum(sum(task) for task in right.values())
    by_task = {name: sum(task) / len(task) for name, task in sorted(right.items())}
    return ExactMatch(total / len(rows), by_task, answers)

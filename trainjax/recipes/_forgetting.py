"""What a sequence of tasks has left of each: as JSON, as a table, as a heat map."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from trainjax import evals, parallel
from trainjax.io import folder

Scores = Mapping[str, Sequence[float]]
"""By name of the score, its value on each task."""

LOSS, ACCURACY, EXACT = "loss", "mean_token_accuracy", "exact_match"


class Report(NamedTuple):
    """What a run has found.

    Attributes:
        method: its name and the coefficients that were given.
        tasks: names, the columns of the matrix.
        stages: what was learned in each, the rows of the matrix.
        scores: before the first stage and after each that is done.
    """

    method: Mapping[str, Any]
    tasks: list[str]
    stages: list[str]
    scores: Sequence[Scores]

    @property
    def score(self) -> str:
        """The score that measures are of: right answers if any were asked for, else right tokens."""
        return EXACT if EXACT in self.scores[0] else ACCURACY

    def rows(self) -> list[tuple[str, Sequence[float]]]:
        """The score on every task with its heading, before and after each stage that is done."""
        heads = ["before", *(f"after {stage}" for stage in self.stages)]
        return [
            (head, scores[self.score]) for head, scores in zip(heads, self.scores, strict=False)
        ]

    def measures(self) -> dict[str, float | None]:
        """Measures of `evals.forgetting` once all is learned; the average alone where they are not defined:
        all tasks learned at once, or one that scored 0 as it was learned, of which nothing is retained.
        """
        if len(self.scores) <= len(self.stages):
            return {}
        untrained, *matrix = np.asarray([scores[self.score] for scores in self.scores])
        if len(self.stages) < len(self.tasks) or not np.diag(matrix)[:-1].all():
            return {"average": float(matrix[-1].mean())}
        return evals.forgetting(np.asarray(matrix), untrained)._asdict()


def write(report: Report, path: Path) -> None:
    """Everything, as JSON: a score's matrix has a row a stage and a column a task."""
    before, *after = report.scores
    matrices = {name: [list(scores[name]) for scores in after] for name in before}
    found = report._asdict() | {"score": report.score, "untrained": before, "scores": matrices}
    with folder.replaced(path) as temporary:
        content = json.dumps(found | {"measures": report.measures()}, indent=1)
        temporary.write_text(content + "\n", encoding="utf-8")


def show(report: Report) -> None:
    """The matrix and its measures, on the terminal."""
    if not parallel.is_first():
        return
    title = f"{report.method['name']}: {report.score.replace('_', ' ')}"
    table = Table("", *report.tasks, title=title, title_justify="left")
    for head, values in report.rows():
        table.add_row(head, *(f"{value:.0%}" for value in values))
    console = Console()
    console.print(table)
    known = {name: value for name, value in report.measures().items() if value is not None}
    console.print(", ".join(_in_words(name, value) for name, value in known.items()))


def _in_words(name: str, value: float) -> str:
    percent = value if name == "retention" else 100 * value
    return f"{name} {percent:.1f}{'%' if name in ('average', 'retention') else ' points'}"


def plot(report: Report, path: Path) -> None:
    """The matrix as a heat map: time goes down, tasks go across."""
    from matplotlib.figure import Figure

    heads, values = zip(*report.rows(), strict=True)
    shape = len(heads), len(report.tasks)
    figure = Figure((2.2 + 1.2 * shape[1], 1.2 + 0.5 * shape[0]), layout="constrained", dpi=130)
    axes = figure.subplots()
    percent = 100 * np.asarray(values)
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in itertools.product(*map(range, shape)):
        value = percent[row, column]
        color = "white" if value > 60 else "black"  # to be read on the cell's own colour
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(shape[1]), [name.replace("_", " ") for name in report.tasks])
    axes.set_yticks(range(shape[0]), [head.replace("_", " ") for head in heads])
    title = f"{report.method['name']}: {report.score}, %".replace("_", " ")
    axes.set_title(title, loc="left", fontsize="medium")
    with folder.replaced(path) as temporary:
        figure.savefig(temporary, format="png")

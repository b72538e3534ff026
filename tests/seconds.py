"""The table of the suite's seconds by folder, beside what each may take, that ends a run of all of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

BUDGET = {
    "tests/continual": 10,
    "tests/data": 60,
    "tests/estimate": 20,
    "tests/evals": 5,
    "tests/io": 30,
    "tests/kits": 20,
    "tests/losses": 80,
    "tests/merging": 30,
    "tests/models": 70,
    "tests/ops": 50,
    "tests/optim": 70,
    "tests/parallel": 60,
    "tests/peft": 160,
    "tests/quant": 20,
    "tests/recipes": 90,
    "tests/rollout": 20,
    "tests/train": 20,
    "tests": 20,
    "trainjax": 5,
}
"""Seconds of one core that the fast tests of a folder may take on a quiet machine; together at most 700."""


def by_folder(reports: list[Any]) -> Counter[str]:
    """Seconds of setting up, calling and tearing down, by the folder of the test."""
    seconds: Counter[str] = Counter()
    for report in reports:
        parts = report.nodeid.split("::")[0].split("/")[:-1]
        folder = parts[0] if parts[0] != "tests" else "/".join(parts[:2])
        seconds[folder] += report.duration
    return seconds


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Prints the table where more than a part of the suite has run."""
    reports = [
        r for some in terminalreporter.stats.values() for r in some if hasattr(r, "duration")
    ]
    seconds = by_folder([report for report in reports if report.nodeid])
    if len(seconds) < 5:
        return
    is_fast = config.getoption("markexpr") == "not parity and not slow"
    terminalreporter.write_sep("-", "seconds by folder" + (", and its budget" if is_fast else ""))
    for folder, spent in seconds.most_common():
        limit = BUDGET.get(folder, 0)
        told = f"{limit:8}{'  over' if spent > limit else ''}" if is_fast else ""
        terminalreporter.write_line(f"{folder:20}{spent:8.1f}{told}")
    total = f"{'all':20}{seconds.total():8.1f}"
    terminalreporter.write_line(total + (f"{sum(BUDGET.values()):8}" if is_fast else ""))

"""A count of the assertions that a run of the tests executes, to compare two states of the suite.

    pytest -p tests.assertions -o enable_assertion_pass_hook=true --assertions before.json
    python -m tests.assertions before.json after.json

Counted are `assert` statements that pass, calls of `numpy.testing` and blocks of `pytest.raises`, each by
file, function and the text of its line, so that a line that moves is the same assertion.
"""

from __future__ import annotations

import functools
import json
import linecache
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent
executed: Counter[str] = Counter()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--assertions", help="file that the counts of executed assertions go to")


def pytest_configure(config: Any) -> None:
    if not config.getoption("assertions"):
        return
    for name in dir(np.testing):
        if name.startswith("assert_"):
            setattr(np.testing, name, _counted(getattr(np.testing, name)))
    pytest.raises = _counted(pytest.raises)


def pytest_assertion_pass() -> None:
    """Of a plugin, whose assertions pytest rewrites too, none is counted."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_of_pytest(frame):
        frame = frame.f_back
    _count(frame)


def pytest_sessionfinish(session: Any) -> None:
    """A worker hands its counts to the session that started it; that one writes the file."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["assertions"] = dict(executed)
    elif file := config.getoption("assertions"):
        Path(file).write_text(json.dumps(dict(sorted(executed.items())), indent=1))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    executed.update(getattr(node, "workeroutput", {}).get("assertions", {}))


def _counted(check: Any) -> Any:
    @functools.wraps(check)
    def counted(*args: Any, **kwargs: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(FOLDER):
            frame = frame.f_back  # `jax.tree.map` may stand between
        _count(frame)
        return check(*args, **kwargs)

    return counted


def _is_of_pytest(frame: FrameType) -> bool:
    return any(name in frame.f_code.co_filename for name in ("pluggy", "_pytest"))


def _count(frame: FrameType | None) -> None:
    if frame is not None and Path(frame.f_code.co_filename).is_relative_to(FOLDER):
        file = Path(frame.f_code.co_filename).relative_to(FOLDER)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        executed[f"{file}::{frame.f_code.co_name}: {line}"] += 1


def compare(before: Counter[str], after: Counter[str]) -> str:
    """Counts of both by folder, and the assertions that are in the first alone."""
    folder = lambda key: key.split("::")[0].rpartition("/")[0] or "."  # noqa: E731
    rows = [
        "| folder | places before | after | executed before | after |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in sorted({folder(key) for key in before | after}):
        places = [sum(folder(key) == name for key in side) for side in (before, after)]
        times = [
            sum(n for key, n in side.items() if folder(key) == name) for side in (before, after)
        ]
        rows.append(f"| {name} | {places[0]} | {places[1]} | {times[0]} | {times[1]} |")
    totals = len(before), len(after), before.total(), after.total()
    rows.append("| all | {} | {} | {} | {} |".format(*totals))
    texts = {key.partition(": ")[2] for key in after}
    gone = [key for key in before if key.partition(": ")[2] not in texts]
    return "\n".join([*rows, "", f"{len(gone)} places whose line stands nowhere now:", *gone])


if __name__ == "__main__":
    print(compare(*(Counter(json.loads(Path(file).read_text())) for file in sys.argv[1:3])))

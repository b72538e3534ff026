"""What the launch kits' tests share: the kits, a `trainjax` on PATH, and a toy job for it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests import toy
from tests.parallel.processes import QUICK

ROOT = Path(__file__).parents[2]


def command(folder: Path, before: str = "") -> dict[str, str]:
    """The environment of a user: this interpreter's `trainjax` on PATH, on CPU, quick to compile.

    Args:
        folder: where the command goes.
        before: lines of shell that it runs first.
    """
    folder.mkdir()
    script = folder / "trainjax"
    script.write_text(f'#!/bin/bash\n{before}\nexec "{sys.executable}" -m trainjax.cli "$@"\n')
    script.chmod(0o755)
    theirs = ("JAX_", "XLA_", "SLURM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    path = f"{folder}:{Path(sys.executable).parent}:{environ['PATH']}"
    return environ | {
        **QUICK,
        "PATH": path,
        "PYTHONPATH": f"{ROOT}:{environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
    }


def flags(folder: Path, **settings: object) -> list[str]:
    """A job that trains every weight of the toy model."""
    model = toy.model_folder(folder / "model")
    rows = toy.write_jsonl(folder / "rows.jsonl", toy.rows())
    settings = {
        "model": model,
        "data": rows,
        "batch_size": 4,
        "max_length": 64,
        "learning_rate": 1e-2,
        "remat": "none",
    } | settings
    return ["sft", "--full", *(f"--{n.replace('_', '-')}={v}" for n, v in settings.items())]


def newest(run: Path) -> int:
    """The step of a run's newest whole checkpoint, 0 without one."""
    names = (path.name for path in (run / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def last_step(run: Path) -> int:
    """The last step in a run's records, 0 without one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

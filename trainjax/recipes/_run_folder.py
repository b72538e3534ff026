"""The folder of a run: who may use it, what made it, where its records go, the last word about it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from trainjax import parallel
from trainjax.io import folder
from trainjax.recipes import _common as common
from trainjax.recipes._configs import StepConfig, TrainConfig
from trainjax.train import metrics

P = TypeVar("P")
R = TypeVar("R")


def claim(out: Path, *, resume: bool) -> None:
    """Makes the run's folder, or says at once why it cannot be used.

    Raises:
        ValueError: it holds another run and this one does not continue it.
        OSError: it cannot be written.
    """
    if not resume and any(
        (out / name).exists() for name in ("config.yaml", "checkpoints", "adapter", "model")
    ):
        raise ValueError(
            f"{out} holds another run; continue it with --resume, or give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass
    parallel.wait_for_all(f"{out} is claimed")  # before one writes what the others would find


def write(config: StepConfig) -> None:
    """Writes the settings to `config.yaml`, and to `run.json` what made the run.

    `run.json` is a list: of the run's start, and of each time that it was resumed.
    """
    common.save_config(config, config.out / "config.yaml")
    if parallel.is_first():
        starts = _starts(config.out)
        with folder.replaced(config.out / "run.json") as temporary:
            text = json.dumps([*starts, _made_by(starts)], indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")


def _starts(out: Path) -> list[dict[str, Any]]:
    path = out / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _made_by(before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Command, versions, machine and date of this start."""
    devices = [device.device_kind for device in jax.devices()]
    return {
        "id": before[0]["id"] if before else uuid.uuid4().hex[:8],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["trainjax", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **common.versions()},
        "machine": {"system": platform.platform(), "host": platform.node()},
        "devices": {kind: devices.count(kind) for kind in dict.fromkeys(devices)},
        "processes": jax.process_count(),
    }


class Told(NamedTuple):
    """Where a run's records go.

    Attributes:
        sinks: each gets every record.
        doing: shows what the run does between two records.
        last: the newest value of each metric.
    """

    sinks: list[metrics.Sink]
    doing: Callable[[str], None]
    last: dict[str, Any]

    def said(self, what: str, f: Callable[[P], R]) -> Callable[[P], R]:
        """The function, which says what it does before it begins."""

        def told(x: P) -> R:
            self.doing(what)
            return f(x)

        return told


@contextlib.contextmanager
def sinks(config: StepConfig, steps: int, done: int) -> Iterator[Told]:
    """Where a run's records go: `metrics.jsonl` and the terminal, and what else is asked for.

    Of several processes, which have the same records, the first one's.
    """
    last: dict[str, Any] = {}
    if not parallel.is_first():
        yield Told([last.update], lambda what: None, last)
        return
    out = config.out
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(metrics.progress(steps, done))
        to = [stack.enter_context(metrics.jsonl(out / "metrics.jsonl", after_step=done)), bar]
        if config.tensorboard:
            to.append(stack.enter_context(metrics.tensorboard(out / "tensorboard")))
        if config.wandb:
            to.append(stack.enter_context(metrics.wandb(**_wandb_settings(config))))
        yield Told([*to, last.update], lambda what: bar({"doing": what}), last)


def _wandb_settings(config: StepConfig) -> dict[str, Any]:
    """The settings of `wandb.init`; a resumed run goes on in the one that it was."""
    return {
        "project": config.wandb,
        "name": config.out.name,
        "dir": str(config.out),
        "config": common.plain(dataclasses.asdict(config)),
        "id": next((start["id"] for start in _starts(config.out)), None),
        "resume": "allow",
    }


def summary(config: TrainConfig, last: Mapping[str, Any], next_command: str) -> str:
    """The last word about a run: its loss, what it left, and what to do with it."""
    names = {"loss": "loss", "eval_loss": "held-out loss"}
    found = [f"{said} {last[name]:.4f}" for name, said in names.items() if name in last]
    left = config.out / ("model" if config.full else "adapter")
    model = f"--model {left}" if config.full else f"--model {config.model} --adapter {config.out}"
    return (
        f"{', '.join(['done', *found])}; the {left.name} is in {left}\n"
        f"next: trainjax {next_command.partition(' ')[0]} {model} {next_command.partition(' ')[2]}"
    )

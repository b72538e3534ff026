"""What a run reports: one record a step, to a file, TensorBoard, the terminal or a hook."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainjax.parallel.devices import device_of_kind
from trainjax.retries import retried

Record = Mapping[str, Any]
"""`step` and the metrics of that step, as plain numbers."""

Sink = Callable[[Record], None]
"""Takes a record: writes it, shows it, sends it somewhere."""


@contextlib.contextmanager
def jsonl(path: Path, *, after_step: int = 0) -> Iterator[Sink]:
    """A file with one JSON object a line. Records of later steps than `after_step` are removed first:
    a resumed run writes them again, and equal ones at that.
    """
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_before(line, after_step)]
        shorter = path.with_name(f".{path.name}.tmp")
        shorter.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        shorter.replace(path)  # at once: whoever is killed here has lost no record
    with path.open("a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(dict(record)) + "\n")
            retried(file.flush)  # what was not written stays in the buffer

        yield write


def _is_before(line: str, after_step: int) -> bool:
    """Whether a line is a record of an earlier step; not so the half line of a killed process."""
    try:
        return json.loads(line)["step"] <= after_step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def tensorboard(directory: Path) -> Iterator[Sink]:
    """Scalars for TensorBoard."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(directory)) as writer:

        def write(record: Record) -> None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, record["step"])

        yield write


@contextlib.contextmanager
def wandb(**settings: Any) -> Iterator[Sink]:
    """Scalars for Weights & Biases, if the package is there; `settings` are those of `wandb.init`."""
    try:
        import wandb as package
    except ImportError as error:
        raise ValueError("logging to wandb needs the package: pip install wandb") from error
    with package.init(**settings) as run:
        yield lambda record: run.log(dict(record), step=record["step"])


@contextlib.contextmanager
def progress(steps: int, done: int = 0) -> Iterator[Sink]:
    """A bar with loss, tokens a second, MFU and the time left; lines now and then off a terminal.

    A record of `doing` alone shows what happens until the next one.
    """
    if not sys.stderr.isatty():
        yield _lines(steps)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=steps, completed=done)
        yield lambda record: bar.update(
            task, completed=record.get("step"), description=_summary(record)
        )


def _lines(steps: int, every_seconds: float = 10.0) -> Sink:
    last = 0.0

    def show(record: Record) -> None:
        nonlocal last
        if "doing" in record:
            print(f"{record['doing']} ...", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        if now - last >= every_seconds or record["step"] in (1, steps):
            last = now
            print(f"step {record['step']}/{steps}  {_summary(record)}", file=sys.stderr, flush=True)

    return show


def _summary(record: Record) -> str:
    parts = [record["doing"]] if "doing" in record else []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "eval_loss" in record:
        parts.append(f"eval loss {record['eval_loss']:.4f}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:.0f} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    return "  ".join(parts)


def peak_memory_bytes() -> int:
    """Peak memory: of the fullest local accelerator, or of the process where there is none; 0 on Windows."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks and jax.default_backend() != "cpu":
        return max(peaks)
    return _peak_of_process()


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows: there is no such count in the standard library
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(dtype: Any = jnp.float32) -> float | None:
    """FLOP/s of all devices together, the denominator of MFU.

    Of accelerators it is the published dense bf16 peak (None for one that is not in `parallel.devices`); of a
    CPU, what a large matrix product in `dtype` reaches here and now, measured in a fifth of a second.
    """
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        return _measured_flops(dtype) * jax.process_count()
    device = device_of_kind(kind)
    return None if device is None else device.flops * jax.device_count()


@functools.cache
def _measured_flops(dtype: Any, size: int = 1024, repeats: int = 5) -> float:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype)
    product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

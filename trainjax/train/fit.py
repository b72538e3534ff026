"""The loop: thirty lines over `make_step` that a user may copy and change."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from trainjax import platform, retries, sharing
from trainjax.train.checkpoint import Checkpoints, may_be_repeated
from trainjax.train.metrics import Sink, peak_memory_bytes
from trainjax.train.state import TrainState
from trainjax.train.step import Step
from trainjax.train.watch import Watch
from trainjax.types import Batch, Loss, Metrics, Params

_log = logging.getLogger(__name__)


@runtime_checkable
class Batches(Protocol):
    """Batches without end, that can say where they stand."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class NotFinite(ArithmeticError):
    """Loss or gradients became NaN or infinite; the params are those before that step."""


class Stopped(Exception):
    """The run was asked to stop by a signal, and has saved.

    Attributes:
        signal: its number.
        step: steps done.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.signal, self.step = number, step


def fit(
    state: TrainState,
    step: Step,
    loss: Loss,
    batches: Batches,
    *,
    steps: int,
    sinks: Sequence[Sink] = (),
    checkpoints: Checkpoints | None = None,
    save_every: int = 0,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    evaluated: Callable[[TrainState], Params] = lambda state: state.params,
    settings: Mapping[str, Any] | None = None,
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
    num_tokens: int = 0,
    stuck_after: float = 600.0,
) -> TrainState:
    """Runs `step` until `steps` are done: reports, evaluates, saves, stops cleanly.

    Step n is dispatched before the metrics of step n-1 are read, so the host never stands between
    two steps. Interrupt (Ctrl-C) and SIGTERM end the run after the step under way, with a checkpoint;
    SIGTERM to one of several processes ends all of them after the same step.

    Args:
        state: where to begin; `state.step` counts what was done before.
        step: from `make_step`.
        loss: what is minimised.
        batches: a `data.Loader`.
        steps: optimizer steps in all, those done before included.
        sinks: each gets a record a step.
        checkpoints: where to save; None to save nothing.
        save_every: steps between checkpoints; 0 for one at the end.
        evaluate: `(params) -> metrics`, run every `eval_every` steps and at the end.
        eval_every: steps between evaluations; 0 for one at the end.
        evaluated: what is evaluated of a state, such as the average that an optimizer keeps.
        settings: JSON that goes into checkpoints, to be compared on resuming.
        derived: adds to a record what the loop cannot know: learning rate, MFU.
        num_tokens: tokens seen before.
        stuck_after: seconds after which a step that has not ended is reported, with the stack; 0 for never.

    Returns:
        The state after the last step.

    Raises:
        NotFinite: naming step, rows and the newest checkpoint.
        Stopped: by a signal, after saving.
    """
    report = _Reporter(sinks, derived, checkpoints, num_tokens)

    def extra() -> dict[str, Any]:
        where = {"batches": batches.get_state(), "num_tokens": report.num_tokens}
        return where | {"settings": dict(settings or {})}

    several = jax.process_count() > 1
    # A signal reaches one process. JAX has all of them agree on the step after which they stop.
    is_preempted = multihost_utils.reached_preemption_sync_point if several else lambda step: False
    others = [] if several else [signal.SIGTERM]
    with _signals(*others) as received, Watch(stuck_after) as watch:
        for number in range(int(state.step) + 1, steps + 1):
            watch.begin(number)
            batch = next(batches)
            state, metrics = step(state, loss, batch)
            report.dispatched(number, metrics, batch)
            due = lambda every, number=number: every and number % every == 0  # noqa: E731
            if is_preempted(number):
                received.append(signal.SIGTERM)
            last = number == steps or bool(received)
            if last or due(save_every) or due(eval_every):
                report.flush()
            if evaluate is not None and (number == steps or due(eval_every)):
                report.add(number, evaluate(evaluated(state)))
            if checkpoints is not None and (last or due(save_every)):
                checkpoints.save(state, extra())
            if received:
                break
    if checkpoints is not None:
        _finish(checkpoints, lambda: checkpoints.save(state, extra()))
    if received:
        raise Stopped(received[0], int(state.step))
    return state


def _finish(checkpoints: Checkpoints, save: Callable[[], None]) -> None:
    """Waits for the last checkpoint; writes it again where the filesystem was away for a moment."""
    try:
        checkpoints.wait()
    except OSError as error:
        if not may_be_repeated(error):
            raise
        _log.warning("%s; writing it again", error)

        def again() -> None:
            save()
            checkpoints.wait()

        retries.retried(again)


class _Pending(NamedTuple):
    step: int
    metrics: Metrics
    tokens: jax.Array
    batch: Batch


class _Reporter:
    """Reads the metrics of a step once the next one is under way, and tells the sinks."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        derived: Callable[[dict[str, Any]], dict[str, Any]],
        checkpoints: Checkpoints | None,
        num_tokens: int,
    ) -> None:
        self._sinks, self._derived, self._checkpoints = sinks, derived, checkpoints
        self.num_tokens = num_tokens
        self._pending: _Pending | None = None
        self._clock = time.perf_counter()

    def dispatched(self, step: int, metrics: Metrics, batch: Batch) -> None:
        self.flush()
        self._pending = _Pending(step, metrics, _count_tokens(batch), batch)

    def flush(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if not values.pop("is_finite"):
            raise NotFinite(self._not_finite(pending, values))
        tokens = int(pending.tokens)
        self.num_tokens += tokens
        record = {"step": pending.step, **values, "num_tokens": self.num_tokens}
        record |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
        self._tell(self._derived(record | {"peak_memory_bytes": peak_memory_bytes()}))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Evaluation's metrics, as a record of their own; its time is not the next step's."""
        self._tell({"step": step, **metrics})
        self._clock = time.perf_counter()

    def _tell(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink(record)

    def _not_finite(self, pending: _Pending, values: Mapping[str, float]) -> str:
        saved = "none" if self._checkpoints is None else self._checkpoints.newest()
        return (
            f"step {pending.step}: loss={values['loss']}, grad_norm={values['grad_norm']} is not finite, "
            f"on rows {_rows(pending.batch)} of the data; the newest checkpoint is {saved}"
        )


@jax.jit
def _count_tokens(batch: Batch) -> jax.Array:
    """Real tokens of a batch, or of all the batches in a dict of them: entries of `rows` that are."""
    rows = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(batch) if _is_rows(path)]
    return sum((jnp.sum(leaf >= 0) for leaf in rows), start=jnp.zeros((), jnp.int32))


def _is_rows(path: tuple[Any, ...]) -> bool:
    return getattr(path[-1], "key", None) == "rows"


def _rows(batch: Batch, most: int = 20) -> list[int]:
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(batch) if _is_rows(path)]
    shards = [np.asarray(shard.data) for leaf in leaves for shard in leaf.addressable_shards]
    rows = (
        np.unique(np.concatenate([shard.ravel() for shard in shards]))
        if shards
        else np.zeros(0, int)
    )
    return rows[rows >= 0].tolist()[:most]


@contextlib.contextmanager
def _signals(*others: signal.Signals) -> Iterator[list[int]]:
    """The signals received that ask to stop: interrupts and others. A second interrupt stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # signals are the main thread's business
        return
    before = {number: signal.signal(number, note) for number in {signal.SIGINT, *others}}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluator(
    loss: Loss, batches: Callable[[], Iterator[Batch]]
) -> Callable[[Params], dict[str, float]]:
    """`(params) -> metrics` over held-out data, for `fit`: `eval_loss` and the loss's own as `eval_*`.

    Args:
        loss: as in training; nothing random is on.
        batches: gives the batches of one pass, whose weights sum to 1 over all of them.
    """
    arrays, restore = sharing.distinct(loss)
    forward = platform.jit(lambda arrays, params, batch: restore(arrays)(params, batch, None))

    def evaluate(params: Params) -> dict[str, float]:
        totals: dict[str, Any] = {}
        for batch in batches():
            value, metrics = forward(arrays, params, batch)
            for name, part in {"loss": value, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + part
        return {f"eval_{name}": float(total) for name, total in totals.items()}

    return evaluate

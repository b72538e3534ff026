"""The endless stream of a plan's batches, filled by a thread ahead of the training."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainjax.data.encode import Examples
from trainjax.data.pipeline import Plan, fill

Arrays = dict[str, np.ndarray]
Place = tuple[int, int]  # an epoch, and how many of its batches are behind


class Prefetched(Iterator[Arrays]):
    """The batches of all epochs, two of them ahead; `close()` ends the thread that fills them.

    Args:
        examples: from `encode`.
        plan: how they become batches.
        rows: those of a batch to fill, a process's own.
    """

    def __init__(self, examples: Examples, plan: Plan, rows: slice) -> None:
        self._examples, self._plan, self._rows = examples, plan, rows
        self._place: Place = (0, 0)
        self._ahead: _Ahead | None = None

    def __next__(self) -> Arrays:
        if self._ahead is None:
            batches = _batches(self._examples, self._plan, self._rows, self._place)
            self._ahead = _Ahead(batches, 2)
        arrays, self._place = self._ahead.take()
        return arrays

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON: after the last batch that was taken."""
        return dict(zip(("epoch", "batch"), self._place, strict=True))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where another stream of the same examples and plan stood."""
        self.close()
        self._place = state["epoch"], state["batch"]

    def close(self) -> None:
        """Ends the thread; what it had filled ahead is filled again if the stream goes on."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _batches(
    examples: Examples, plan: Plan, rows: slice, place: Place
) -> Iterator[tuple[Arrays, Place]]:
    """Each batch from a place on, and the place after it."""
    first, done = place
    for epoch in itertools.count(first):
        planned = plan.epoch(examples, epoch)
        for number in range(done, len(planned)):
            yield fill(examples, plan, planned[number], rows=rows), (epoch, number + 1)
        done = 0


class _Ahead:
    """What an iterator gives, taken by a thread that is `size` items ahead."""

    def __init__(self, items: Iterator[Any], size: int) -> None:
        self._items: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(size)
        self._is_closed = threading.Event()
        # A daemon: a program that never closes the stream ends all the same.
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def take(self) -> Any:
        item, error = self._items.get()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self._is_closed.set()
        while self._thread.is_alive():
            self._drop()  # so that a thread that waits for room goes on, and sees the end
            self._thread.join(0.01)

    def _run(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._items.put((item, None))
                if self._is_closed.is_set():
                    return
        except BaseException as error:
            self._items.put((None, error))  # raised where the batch is asked for

    def _drop(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except queue.Empty:
            return

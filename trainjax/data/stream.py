"""The endless stream of a plan's batches, filled by a thread of Grain's."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from trainjax.data.encode import Examples
from trainjax.data.pipeline import BatchPlan, Plan, fill


def prefetched(
    examples: Examples, plan: Plan, rows: slice
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """The batches, two of them ahead; `close()` ends the thread.

    Args:
        examples: from `encode`.
        plan: how they become batches.
        rows: those of a batch to fill, a process's own.
    """
    batches = _Batches(examples, plan, rows)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))


class _Batches(grain.IterDataset[dict[str, np.ndarray]]):
    """The stream as a Grain dataset: one process's rows of each batch."""

    def __init__(self, examples: Examples, plan: Plan, rows: slice) -> None:
        super().__init__()
        self.examples, self.plan, self.rows = examples, plan, rows

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    def __init__(self, dataset: _Batches) -> None:
        super().__init__()
        self._dataset = dataset
        self._epoch, self._batch = 0, 0
        self._planned: tuple[int, list[BatchPlan]] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batch == len(self._plan()):
            self._epoch, self._batch = self._epoch + 1, 0
        batch = self._plan()[self._batch]
        self._batch += 1
        return fill(self._dataset.examples, self._dataset.plan, batch, rows=self._dataset.rows)

    def _plan(self) -> list[BatchPlan]:
        if self._planned is None or self._planned[0] != self._epoch:
            plan = self._dataset.plan.epoch(self._dataset.examples, self._epoch)
            self._planned = self._epoch, plan
        return self._planned[1]

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._batch = state["epoch"], state["batch"]

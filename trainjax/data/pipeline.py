"""From examples to batches on the devices: planned, shuffled, packed, sharded, resumable.

The plan of an epoch (which examples share which row of which batch) is made from lengths and seed
alone. Every process makes the same plan and fills only its own rows of each batch. The state of the
iterator is therefore two numbers, whatever the number of processes, and the weights of a batch are
normalised over all of it without communication.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from trainjax import axes
from trainjax.data.curriculum import Order, shuffled
from trainjax.data.encode import Examples, Groups
from trainjax.data.packing import Pack, best_fit, unpacked
from trainjax.types import Batch

Weigh = Callable[[Examples, np.ndarray], Float[np.ndarray, " examples"]]
"""`(examples, which) -> weight of each target of each example`, before normalisation."""


def token_mean(examples: Examples, which: np.ndarray) -> Float[np.ndarray, " examples"]:
    """Every target counts the same: the mean over the batch's tokens."""
    del examples
    return np.ones(len(which))


def sequence_mean(examples: Examples, which: np.ndarray) -> Float[np.ndarray, " examples"]:
    """Every example counts the same, however many targets it has."""
    return 1.0 / np.maximum(examples.targets[which], 1)


class BatchPlan(NamedTuple):
    """One global batch before it is filled: rows of examples, and the length they are padded to."""

    rows: list[list[int]]
    length: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How examples become batches.

    Attributes:
        batch_size: rows of a global batch.
        length: longest row, in tokens.
        pack: `packing.best_fit` or `packing.unpacked`.
        seed: of the order; None keeps the order of the source.
        order: which examples an epoch visits in which order; see `curriculum`.
        weigh: `token_mean` or `sequence_mean`.
        window: examples that are packed together; keeps planning fast on large data, and an order
            that means something (a curriculum) roughly in place.
        buckets: unpacked rows are padded to one of this many lengths, so that as many programs are
            compiled and no more.
    """

    batch_size: int
    length: int
    pack: Pack = best_fit
    seed: int | None = 0
    order: Order = shuffled
    weigh: Weigh = token_mean
    window: int = 2**16
    buckets: int = 4

    def epoch(self, examples: Examples, number: int) -> list[BatchPlan]:
        """All batches of an epoch; what it visits is in exactly one. The last may have fewer rows."""
        count, longest = len(examples), int(examples.lengths.max())
        if longest > self.length:
            raise ValueError(
                f"an example has {longest} tokens, a row {self.length}: encode shorter ones"
            )
        rng = None if self.seed is None else np.random.default_rng((self.seed, number))
        order = self.order(count, number, rng)
        batches: list[BatchPlan] = []
        for start in range(0, len(order), self.window):
            which = order[start : start + self.window]
            batches += self._window(which, examples.lengths[which], rng)
        return batches

    def _window(
        self, which: np.ndarray, lengths: np.ndarray, rng: np.random.Generator | None
    ) -> list[BatchPlan]:
        bins = self.pack(lengths.tolist(), self.length)
        if self.pack is unpacked:
            return self._buckets(which, lengths, rng)
        if rng is not None:
            rng.shuffle(bins)
        rows = [which[members].tolist() for members in bins]
        return [BatchPlan(group, self.length) for group in _groups(rows, self.batch_size)]

    def _buckets(
        self, which: np.ndarray, lengths: np.ndarray, rng: np.random.Generator | None
    ) -> list[BatchPlan]:
        """Examples of like length together, so that little is padding; then batches in any order."""
        order = np.arange(len(which)) if rng is None else np.argsort(lengths, kind="stable")
        step = max(8, -(-self.length // self.buckets // 8) * 8)
        batches = []
        for group in _groups(order.tolist(), self.batch_size):
            longest = int(lengths[group].max())
            length = min(self.length, -(-longest // step) * step)
            batches.append(BatchPlan([[int(which[i])] for i in group], length))
        if rng is not None:
            rng.shuffle(batches)
        return batches


def fill(
    examples: Examples,
    plan: Plan,
    batch: BatchPlan,
    *,
    rows: slice = slice(None),
    total: float | None = None,
    num_groups: int | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of some rows of a planned batch; see `types.Batch` for what they are.

    Unpacked rows have no `segments` and `positions`: one example a row from its beginning is what a
    model assumes without them. Groups of completions have them always, and arrays of their own.

    Args:
        examples: the tokens.
        plan: for the weights.
        batch: which examples are in which row.
        rows: the rows to fill, a process's own.
        total: what the weights are divided by; by default their sum over the whole batch.
        num_groups: the same for groups of completions, which weigh the same; by default the batch's.
    """
    if total is None:
        total = total_weight(examples, plan, [e for row in batch.rows for e in row]) or 1.0
    padded = batch.rows + [[]] * (plan.batch_size - len(batch.rows))
    shape = (len(padded[rows]), batch.length)
    out = {
        "tokens": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "rows": np.full(shape, -1, np.int32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    if examples.reference is not None:
        out["reference_logprobs"] = np.zeros(shape, np.float32)
    for row, members in enumerate(padded[rows]):
        at = 0
        weights = plan.weigh(examples, np.asarray(members, np.int64))
        for segment, (example, weight) in enumerate(zip(members, weights, strict=True), 1):
            taken = examples.slice_of(example)
            here = slice(at, at + taken.stop - taken.start)
            out["tokens"][row, here] = examples.tokens[taken]
            out["weights"][row, here] = examples.trained[taken] * (weight / total)
            out["rows"][row, here] = examples.rows[example]
            out["segments"][row, here] = segment
            out["positions"][row, here] = np.arange(here.stop - here.start)
            if examples.reference is not None:
                out["reference_logprobs"][row, here] = examples.reference[taken]
            at = here.stop
    if examples.groups is not None:
        weight = 1.0 / (num_groups or sum(map(len, batch.rows)))
        return out | _group_arrays(examples, examples.groups, plan, batch, padded[rows], weight)
    if plan.pack is unpacked:
        del out["segments"], out["positions"]
    return out


def _group_arrays(
    examples: Examples,
    groups: Groups,
    plan: Plan,
    batch: BatchPlan,
    rows: Sequence[Sequence[int]],
    weight: float,
) -> dict[str, np.ndarray]:
    """What rows of groups hold besides tokens, weights and row numbers, or in another form."""
    names = ("segments", "positions", "completions", "prefixes")
    out = {name: np.zeros((len(rows), batch.length), np.int32) for name in names}
    slots = 1 if plan.pack is unpacked else batch.length // int(examples.lengths.min())
    out["groups"] = np.zeros((len(rows), slots), np.float32)
    for name, values in groups.values.items():
        out[name] = np.zeros((len(rows), slots, *values.shape[1:]), np.float32)
    for row, members in enumerate(rows):
        at = 0
        for slot, example in enumerate(members):
            taken = examples.slice_of(example)
            here = slice(at, at + taken.stop - taken.start)
            branches, first = groups.branches[taken], 1 + slot * (groups.size + 1)
            shared = int((branches == 0).sum())
            out["segments"][row, here] = first + branches
            out["prefixes"][row, here] = np.where((branches > 0) & (shared > 0), first, 0)
            out["positions"][row, here] = _positions(branches, shared)
            out["completions"][row, here] = np.where(
                groups.targets[taken], slot * groups.size + branches, 0
            )
            out["groups"][row, slot] = weight
            for name, values in groups.values.items():
                out[name][row, slot] = values[example]
            at = here.stop
    if not groups.shares_prompts:
        del out["prefixes"]
    return out


def _positions(branches: np.ndarray, shared: int) -> np.ndarray:
    """Each token's place in its own text: a branch goes on where the shared prompt ends."""
    starts = np.flatnonzero(np.diff(branches, prepend=-1))
    lengths = np.diff(starts, append=len(branches))
    offset = np.arange(len(branches)) - np.repeat(starts, lengths)
    return offset + np.where(branches > 0, shared, 0)


def total_weight(examples: Examples, plan: Plan, which: list[int]) -> float:
    """The sum of the weights of some examples' targets, before normalisation."""
    indices = np.asarray(which)
    return float((plan.weigh(examples, indices) * examples.targets[indices]).sum())


class Loader(Iterator[Batch]):
    """Batches on the devices, without end; `get_state` and `set_state` make it resumable.

    A thread fills the next batches while the devices work on this one.

    Args:
        examples: from `encode`.
        plan: how they become batches.
        mesh: splits rows over its axes for them; see `trainjax.axes`.

    Raises:
        ValueError: a batch, or rows, that the mesh does not divide; a batch of which this process has
            scattered rows.
    """

    def __init__(self, examples: Examples, plan: Plan, mesh: Mesh | None = None) -> None:
        from trainjax.data.stream import Prefetched  # which imports this file

        self.examples, self.plan, self.mesh = examples, plan, mesh
        check_length(plan.length, axes.length(mesh, "sequence"))
        self._iterator = Prefetched(examples, plan, own_rows(plan.batch_size, mesh))
        weakref.finalize(self, self._iterator.close)  # its thread would outlive the interpreter

    def __next__(self) -> Batch:
        return to_devices(next(self._iterator), self.mesh, self.plan.batch_size)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON: after the last batch that was taken."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where another loader of the same data and plan stood."""
        self._iterator.set_state(state)


def one_epoch(examples: Examples, plan: Plan, mesh: Mesh | None = None) -> Iterator[Batch]:
    """Every example once, for evaluation: the weights sum to 1 over all batches together, so the sum
    of the batches' losses is the loss on the data.
    """
    total = total_weight(examples, plan, list(range(len(examples)))) or 1.0
    rows, count = own_rows(plan.batch_size, mesh), len(examples)
    # The order of training may visit a part of the examples, or be one of other examples.
    plan = dataclasses.replace(plan, order=shuffled)
    for batch in plan.epoch(examples, 0):
        arrays = fill(examples, plan, batch, rows=rows, total=total, num_groups=count)
        yield to_devices(arrays, mesh, plan.batch_size)


def check_length(length: int, parts: int) -> None:
    """Raises for rows that the mesh's `sequence` does not divide.

    Args:
        length: tokens of a row.
        parts: devices that share one.

    Raises:
        ValueError: of such rows.
    """
    if length % parts:
        raise ValueError(
            f"rows of {length} tokens are not divisible by the mesh's sequence={parts}; use "
            f"{-(-length // parts) * parts}"
        )


def own_rows(batch_size: int, mesh: Mesh | None) -> slice:
    """The rows of a global batch that this process fills: those of its devices.

    Processes whose devices share a row (split over `tensor`) fill it each.
    """
    shards = axes.num_row_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by the mesh's {shards} row shards"
        )
    if mesh is None:
        return slice(0, batch_size)
    layout = NamedSharding(mesh, PartitionSpec(axes.rows(mesh)))
    parts = layout.addressable_devices_indices_map((batch_size,)).values()
    bounds = {index[0].indices(batch_size)[:2] for index in parts if index is not None}
    first, last = min(start for start, _ in bounds), max(stop for _, stop in bounds)
    if sum(stop - start for start, stop in bounds) != last - first:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} gives this process rows of the batch that are not side by side; "
            "order its axes so that a process's devices are neighbours along data and fsdp"
        )
    return slice(first, last)


def to_devices(arrays: dict[str, np.ndarray], mesh: Mesh | None, batch_size: int) -> Batch:
    """A process's rows as (part of) a global batch, split over the mesh."""
    if mesh is None:
        return jax.device_put(arrays)
    layout = NamedSharding(mesh, PartitionSpec(axes.rows(mesh)))
    return {
        name: jax.make_array_from_process_local_data(layout, array, (batch_size, *array.shape[1:]))
        for name, array in arrays.items()
    }


def _groups(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))

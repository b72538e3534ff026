"""Which examples share a row: plans made from lengths alone."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

Pack = Callable[[Sequence[int], int], list[list[int]]]
"""`(lengths, capacity) -> bins`: each a list of positions in `lengths`, whose lengths fit together."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each example into the fullest row that still has room; the long ones first, longest first.

    Examples of at most a quarter of a row come last and in the order given, which is a shuffled one
    in training. Sorted like the others (best-fit decreasing) they would fill rows with examples of one
    length, which often are of one kind, and the gradients of two batches would have little in common.
    It costs at most 2% of the slots, and less the shorter they are.

    Whenever one of them opens a row, every other row is more than three quarters full; rows opened by
    long ones are at most 11/9 of the fewest possible, plus one (Johnson et al. 1974).

    >>> best_fit([6, 5, 4, 3], 9)
    [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # free space -> bins that have it
    spaces: list[int] = []  # the free spaces that some bin has, sorted
    sizes = np.asarray(lengths)
    for item in np.argsort(-np.where(sizes > capacity / 4, sizes, 0), kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            chosen = with_room[space].pop()
            if not with_room[space]:
                del spaces[at]
        bins[chosen].append(item)
        left = space - length
        if not with_room[left]:
            bisect.insort(spaces, left)
        with_room[left].append(chosen)
    return bins


def unpacked(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """One example a row."""
    del capacity
    return [[item] for item in range(len(lengths))]

"""Which examples share a row: plans made from lengths alone."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

Pack = Callable[[Sequence[int], int], list[list[int]]]
"""`(lengths, capacity) -> bins`: each a list of positions in `lengths`, whose lengths fit together."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room.

    Uses at most 11/9 of the fewest rows possible, plus one (Johnson et al. 1974); on instruction data
    rows are 99% full and more.

    >>> best_fit([6, 5, 4, 3], 9)
    [[0, 3], [1, 2]]
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # free space -> bins that have it
    spaces: list[int] = []  # the free spaces that some bin has, sorted
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
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

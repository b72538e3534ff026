"""Methods that are a choice of rows: each task's own, some of earlier tasks again, or all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainjax.continual.method import Method, Rows, checked_strength, in_turn
from trainjax.data.replay import add, replayed, reservoir


def sequential() -> Method:
    """One task after another with nothing against forgetting: the floor of a comparison."""
    return Method()


def joint() -> Method:
    """All tasks at once, their rows mixed: the ceiling of a comparison, and no continual learning."""
    return Method(stages=lambda sizes, seed: [np.arange(sum(sizes))])


def replay(strength: float = 0.25, capacity: int = 1000) -> Method:
    """Rows of earlier tasks come again among those of the new one, from a reservoir.

    Args:
        strength: rows that come again, for each row of the new task; never more than there are. At
            equal steps they take the new task's place.
        capacity: rows that are kept: a uniform sample of all rows of earlier tasks.

    Raises:
        ValueError: a strength that is not above 0; a capacity below 1.
    """
    checked_strength(strength)
    reservoir(capacity)  # says at once what is wrong with a capacity

    def stages(sizes: Sequence[int], seed: int) -> list[Rows]:
        kept, found = reservoir(capacity, seed), []
        for number, own in enumerate(in_turn(sizes, seed)):
            count = min(round(strength * len(own)), len(kept.rows))
            again = replayed(kept.rows, count, seed=seed, step=number)
            found.append(np.concatenate([own, again]))
            kept = add(kept, own)
        return found

    return Method(stages=stages)

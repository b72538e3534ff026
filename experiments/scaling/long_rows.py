"""Attention, forward and backward, of each quarter of a long row beside that of the whole row; see README.md.

python experiments/scaling/long_rows.py
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trainjax.ops.blocked import blocked
from trainjax.ops.tiled import tiled

LENGTH, PARTS, HEADS, KV_HEADS, DIM = 4096, 4, 9, 3, 64
TILE = (256, 512)


def program(attend: Callable[..., jax.Array], at: np.ndarray) -> jax.stages.Compiled:
    """Output and gradients of the queries at these places of a row."""

    def value(query: jax.Array, key: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, other, jnp.asarray(at)))

    query, key, other = arrays(len(at))
    return jax.jit(jax.grad(value, (0, 1, 2))).lower(query, key, other).compile()


def arrays(seq: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries of a part, keys and values of the row."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((seq, HEADS), (LENGTH, KV_HEADS), (LENGTH, KV_HEADS))
    query, key, value = (
        jax.random.normal(k, (1, *shape, DIM)) for k, shape in zip(keys, shapes, strict=True)
    )
    return query, key, value


def main() -> None:
    """Prints the table: all programs by turns, medians of five."""
    row, attend = np.arange(LENGTH), functools.partial(tiled, tile=TILE)
    parts, halves = np.split(row, PARTS), np.split(row, 2 * PARTS)  # the halves of the parts
    places = {f"part {part + 1} of {PARTS}": own for part, own in enumerate(parts)}
    for part in range(PARTS):
        pair = [2 * part, 2 * PARTS - 1 - 2 * part]
        name = f"halves {pair[0] + 1} and {pair[1] + 1} of {2 * PARTS}"
        places[name] = np.concatenate([halves[half] for half in pair])
    programs = {"the whole row, `ops.blocked`": program(lambda q, k, v, at: blocked(q, k, v), row)}
    programs |= {"the whole row, `ops.tiled`": program(attend, row)}
    programs |= {name: program(attend, at) for name, at in places.items()}
    lengths = {name: len(places.get(name, row)) for name in programs}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(6):
        for name, run in programs.items():
            given = arrays(lengths[name])
            start = time.perf_counter()
            jax.block_until_ready(run(*given))
            times[name] += [time.perf_counter() - start] if number else []
    print("| what | ms | temporary, MB |")
    print("|---|---|---|")
    for name, run in programs.items():
        memory = run.memory_analysis().temp_size_in_bytes / 1e6
        print(f"| {name} | {1e3 * statistics.median(times[name]):.0f} | {memory:.0f} |")


if __name__ == "__main__":
    main()

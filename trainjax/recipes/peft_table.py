"""What each adapter method costs on a model: what trains, optimizer state, size of the file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from trainjax import peft, tree
from trainjax.io.hub import read_config
from trainjax.models._adapters import peft_modules
from trainjax.models._model import abstract_params, family
from trainjax.nn import Decoder
from trainjax.recipes import _common as common
from trainjax.types import Params, Peft

METHODS: dict[str, Callable[..., Peft]] = {
    **common.PEFT,
    "rslora": functools.partial(peft.lora, rslora=True),
    "prefix, projected": functools.partial(peft.prefix, prefix_projection=True),
    "partial, norms": functools.partial(peft.partial, target="norm"),
}
"""Methods of the command line, and settings of them that people know by a name."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints a table of the adapter methods; nothing of the model is read but its shapes."""

    model: str
    """A hub id, a folder with a config.json, a .gguf file, or a name that `trainjax fetch` knows."""
    rank: int | None = None
    """Rank of the methods that have one; by default each one's own."""
    target: str | None = None
    """Regex of the matrices that get an adapter, of the methods that have one; by default each one's own."""
    json: bool = False
    """Print JSON, a list with an object a method."""
    markdown: bool = False
    """Print the table in Markdown."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a method costs.

    Attributes:
        method: its name.
        trainable: numbers that train.
        percent: of the model's numbers.
        optimizer_bytes: of AdamW's state: two float32 moments of each, and the count of steps.
        file_bytes: of the arrays in the adapter's file, frozen ones included; its header comes on top.
            Of an adapter beyond 1 GiB, of the arrays in memory.
        merges: whether the model with the adapter can be written as plain weights.
    """

    method: str
    trainable: int
    percent: float
    optimizer_bytes: int
    file_bytes: int
    merges: bool


def main(config: Config) -> None:
    """Runs the job."""
    if config.json and config.markdown:
        raise ValueError("--json and --markdown are two ways to print the table; give one")
    hf = read_config(config.model)
    params = abstract_params(Decoder(family(hf).config(hf), jnp.dtype(jnp.float32)))
    rows = list(_rows(params, peft_modules(hf, params), config))
    if config.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif config.markdown:
        print(_markdown(rows))
    else:
        print(f"{config.model}: {tree.count(params):,} parameters")
        Console().print(_table(rows))


def _rows(params: Params, modules: Mapping[str, str], config: Config) -> Iterator[Row]:
    total = tree.count(params)
    for name, make in METHODS.items():
        if (method := _made(make, config)) is None:
            continue
        adapter = jax.eval_shape(method.init, jax.random.key(0), params)
        trainable = tree.trainable(adapter)
        numbers = tree.count(trainable)
        state = jax.eval_shape(optax.adamw(1e-3).init, trainable)
        yield Row(
            name,
            numbers,
            100 * numbers / total,
            tree.num_bytes(state),
            _file_bytes(method, adapter, modules),
            _merges(method, params, adapter),
        )


def _made(make: Callable[..., Peft], config: Config) -> Peft | None:
    """The method with the settings of ours that it has; None where it needs one that is not given."""
    ours = {"rank": config.rank, "target": config.target}
    given = {name: value for name, value in ours.items() if value is not None}
    known = inspect.signature(make).parameters.values()
    if any(p.default is p.empty and p.name not in given for p in known):
        return None
    return make(**{p.name: given[p.name] for p in known if p.name in given})


def _file_bytes(method: Peft, adapter: Params, modules: Mapping[str, str]) -> int:
    size = tree.num_bytes(adapter)
    if size > _TOO_LARGE_TO_MAKE:
        return size
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), adapter)
    return sum(tensor.nbytes for tensor in method.export(zeros, modules).tensors.values())


def _merges(method: Peft, params: Params, adapter: Params) -> bool:
    try:
        jax.eval_shape(method.merge, params, adapter)
    except ValueError:  # which is how a method says that no weights have its function
        return False
    return True


_TOO_LARGE_TO_MAKE = 2**30
_COLUMNS = ("method", "trainable", "% of model", "AdamW state", "adapter file", "merges")


def _cells(row: Row) -> tuple[str, ...]:
    sizes = _size(row.optimizer_bytes), _size(row.file_bytes)
    merges = "yes" if row.merges else "no"
    return row.method, f"{row.trainable:,}", f"{row.percent:.3g}", *sizes, merges


def _size(count: int) -> str:
    """Bytes as people say them.

    >>> _size(39_075_844)
    '39.1 MB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _table(rows: list[Row]) -> Table:
    table = Table(box=None)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("method", "merges") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _markdown(rows: list[Row]) -> str:
    lines = [_COLUMNS, ("---", *["---:"] * 4, "---"), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

"""Progressive unfreezing: a model that trains by stages, in each more of it than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from trainjax import tree
from trainjax.peft.partial import partial
from trainjax.types import Params, Peft, PeftFiles

T = TypeVar("T")


def unfreezing(patterns: Sequence[str]) -> list[Peft]:
    """A method a stage: stage `k` trains what any of the patterns up to its own matches.

        stages = unfreezing(last_first(30))
        state = tj.train.init(stages[0].init(key, model.params), tx)
        for before, stage in itertools.pairwise([stages[0], *stages]):
            new = tj.train.init(stage.init(key, model.params), tx)
            state = grow(before, stage, model.params, state, new)
            loss = tj.losses.sft(tj.policy(model, stage))
            for batch in one_epoch():
                state, metrics = step(state, loss, batch)

    A stage is one compilation of the step. It costs what `partial` of its names costs, and the last
    stage is to be saved or merged.

    Args:
        patterns: regexes over names as `partial` takes them, what trains first in front.

    Raises:
        ValueError: no pattern, or two that are equal; a regex that is none.

    Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.3 (gradual unfreezing).
    """
    if not patterns:
        raise ValueError(
            "unfreezing needs a pattern for each stage, such as ['norm|head', 'layers/29/']"
        )
    if len(set(patterns)) < len(patterns):
        raise ValueError(
            f"patterns={list(patterns)} has one twice: a stage unfreezes something more"
        )
    for pattern in patterns:
        tree.regex(pattern)
    groups = [f"(?:{pattern})" for pattern in patterns]
    return [partial("|".join(groups[: stage + 1])) for stage in range(len(groups))]


def last_first(num_layers: int, group: int = 1) -> list[str]:
    """Patterns from the output to the input: last norm and head, the layers, the embeddings.

    Args:
        num_layers: of the model.
        group: layers in a stage; the first layers may be fewer.

    >>> last_first(3, group=2)
    ['^(norm|head)/', '^layers/(2|1)/', '^layers/(0)/', '^embed/']
    """
    if group < 1:
        raise ValueError(f"group={group}: a stage unfreezes at least 1 layer")
    down = list(range(num_layers - 1, -1, -1))
    groups = [down[i : i + group] for i in range(0, num_layers, group)]
    layers = [f"^layers/({'|'.join(map(str, numbers))})/" for numbers in groups]
    return ["^(norm|head)/", *layers, "^embed/"]


def grow(before: Peft, after: Peft, params: Params, old: T, new: T) -> T:
    """What a stage trained, in the form of the next stage: an adapter, an optimizer state, or both.

    Arrays are found by their place in the tree. Those of weights that trained already have their old
    values (a stack of layers in those layers), moments of Adam too; those of the newly unfrozen keep
    what `new` has: weights of the base, moments of zero. Everything else, step and counts, is the old.

    The counts being old, Adam does not correct the new moments for their start: the first update of a
    new weight is about `(1 - b1) / sqrt(1 - b2)` learning rates, 3.2 by default. A learning rate that
    warms up again in each stage makes good for that.

    Args:
        before, after: the stages' methods, of `unfreezing` or `partial`.
        params: the base.
        old: of the stage before: an adapter, an Optax state, or a whole `TrainState`.
        new: the same of the next stage, as it begins: `tj.train.init(after.init(key, params), tx)`.

    Raises:
        ValueError: something that trained before does not train after; an array of the old state that
            has no place in the new one.
    """
    rows = _rows(before, params), _rows(after, params)
    for name, numbers in rows[0].items():
        if not set(numbers) <= set(rows[1].get(name, ())) or name not in rows[1]:
            raise ValueError(
                f"{name} trains in the stage before, and in the next one not or in fewer layers"
            )
    earlier = dict(jax.tree_util.tree_leaves_with_path(old))
    places = {path for path, _ in jax.tree_util.tree_leaves_with_path(new)}
    if lost := [path for path in earlier if path not in places]:
        raise ValueError(
            f"the old state has {jax.tree_util.keystr(lost[0])} and the new one does not; both are to "
            "be of the same optimizer"
        )

    def leaf(path: tuple[Any, ...], fresh: Array) -> Array:
        return _carried(path, earlier[path], fresh, *rows) if path in earlier else fresh

    return jax.tree_util.tree_map_with_path(leaf, new)


Rows = dict[str, tuple[int, ...]]
"""By name of a leaf, the layers that the rows of its leading axis are of; none for one without layers."""


def _rows(method: Peft, params: Params) -> Rows:
    """The rows of a stage's adapter: its `init` is given the layers' numbers in the place of weights."""

    def numbers(name: str, leaf: Any) -> Array:
        return jnp.arange(leaf.shape[0] if name.startswith("layers/") else 0)

    found = tree.flatten(method.init(jax.random.key(0), tree.map_named(numbers, params)))
    return {name: tuple(np.asarray(leaf, int).tolist()) for name, leaf in found.items()}


def _carried(path: tuple[Any, ...], old: Array, new: Array, before: Rows, after: Rows) -> Array:
    """An array of the old state, in the shape that it has in the new one."""
    if old.shape == new.shape:
        return old
    name = _name(path)
    here, there = before.get(name, ()), after.get(name, ())
    if here and old.shape[1:] == new.shape[1:] and (len(old), len(new)) == (len(here), len(there)):
        places = np.asarray([there.index(number) for number in here])
        return jax.device_put(new.at[places].set(old), new.sharding)
    raise ValueError(
        f"{jax.tree_util.keystr(path)} is {old.shape} in the old state and {new.shape} in the new one, "
        f"which are no layers of {name or 'a weight'}"
    )


def _name(path: tuple[Any, ...]) -> str:
    """The weight that an array belongs to: the keys of dicts that its place in a state ends with."""
    keys: list[str] = []
    for part in reversed(path):
        if not isinstance(part, jax.tree_util.DictKey):
            break
        keys.insert(0, str(part.key))
    return "/".join(keys)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """None: the files of a stage are those of `partial`."""
    return None

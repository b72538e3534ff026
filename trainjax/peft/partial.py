"""Full and partial tuning: weights that are chosen by name train, in the form of an adapter."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray

from trainjax import tree
from trainjax.peft import _own_files as own_files
from trainjax.types import Params, Peft, PeftFiles

_STACK = "layers/"
"""What the names of parameters begin with whose leading axis is the layers."""


@dataclasses.dataclass(frozen=True)
class _Config:
    target: str


def full() -> Peft:
    """Every weight trains, in float32, beside a base that stays.

    For what needs a base as well: a reference without a second model, `merge`, a last stage of
    unfreezing. Costs as many trained numbers as the model has; `policy(model)` without a method trains
    the same without keeping the base.

    Raises:
        ValueError: a base with quantised matrices.
    """
    return partial("")


def partial(target: str) -> Peft:
    """The weights whose name matches `target` train in float32, from their values in the base.

    Any leaf: matrices, biases, norms, embeddings (where these are tied, the output head with them).
    Names may hold the layer's number: `layers/(28|29)/|^norm` is two layers and the last norm.
    Then the adapter, and so the optimizer, holds those layers alone.

    Costs the chosen weights as trained numbers, and a step's compute up to that of full tuning. A leaf
    of which all layers train takes its base's place. Of one with some layers the forward pass
    has a copy, all layers in the base's dtype with the trained ones put in, and the backward pass that
    copy's gradient; these last a step.

    Args:
        target: regex over parameter names such as `layers/attention/query/kernel`, or with a number
            `layers/28/attention/query/kernel`. (`layers/2` is 20 to 29 too; `layers/2/` is one layer.)

    Raises:
        ValueError: nothing matches; a quantised matrix matches, which does not train.

    Source: for a share of the layers, Lee, Tang and Lin 2019, arXiv:1911.03090. Feature extraction
    is `partial("^(norm|head)/")`, or a head that scores without an adapter.
    """
    return _method(_Config(target))


def trained_layers(target: str, params: Params) -> dict[str, tuple[int, ...] | None]:
    """For each leaf that `partial(target)` trains, the numbers of its layers; None for one without.

    Args:
        target: as in `partial`.
        params: the base, for names and shapes.

    Raises:
        ValueError: nothing matches.

    >>> import jax.numpy as jnp
    >>> params = {"layers": {"up": {"kernel": jnp.zeros((4, 2, 3))}}, "norm": {"scale": jnp.ones(2)}}
    >>> trained_layers("layers/[23]/|norm", params)
    {'layers/up/kernel': (2, 3), 'norm/scale': None}
    """
    pattern, named = tree.regex(target), tree.flatten(params)
    found = {name: _numbers(pattern, name, leaf.shape) for name, leaf in named.items()}
    found = {name: numbers for name, numbers in found.items() if numbers != ()}
    if not found:
        names = ", ".join(named)
        raise ValueError(
            f"no parameter's name matches {target!r}; the names are {names}, and those of a layer with "
            "its number too, as in layers/0/"
        )
    return found


def _numbers(pattern: re.Pattern[str], name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The layers of a leaf that match, or None for a leaf without layers that matches."""
    if pattern.search(name):
        return tuple(range(shape[0])) if name.startswith(_STACK) else None
    if not name.startswith(_STACK):
        return ()
    return tuple(i for i in range(shape[0]) if pattern.search(tree.numbered(name, (i,))))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    return Peft(
        bind(_init, config),
        bind(_attach, config),
        bind(_merge, config),
        bind(_export, config),
        layers=bind(trained_layers, config.target),
    )


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    """The weights as they are: nothing is drawn."""
    named, layers = tree.flatten(params), trained_layers(config.target, params)
    return tree.unflatten({name: _taken(name, named[name], ids) for name, ids in layers.items()})


def _taken(name: str, w: Any, numbers: tuple[int, ...] | None) -> Array:
    """The layers of a leaf, laid out over devices as it is."""
    _refuse_quantised(name, w)
    values = w if _is_whole(w, numbers) else w[np.asarray(numbers)]
    values = values.astype(jnp.float32)
    if isinstance(w, jax.core.Tracer) or not isinstance(w.sharding, NamedSharding):
        return values
    return jax.device_put(values, w.sharding)


def _refuse_quantised(name: str, w: Any) -> None:
    if tree.is_weight(w):
        raise ValueError(
            f"{name} is a {type(w).__name__}, and a quantised matrix does not train; load the base "
            "unquantised, or train an adapter such as lora over it"
        )


def _is_whole(w: Any, numbers: tuple[int, ...] | None) -> bool:
    return numbers is None or len(numbers) == w.shape[0]


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    """Nothing of it is random: the key has no effect."""

    def leaf(w: Any, values: Array, numbers: tuple[int, ...] | None) -> Array:
        # Norms and biases are small: in bf16 they would not see a step that is small beside them.
        return _placed(w.astype(jnp.float32) if w.ndim == 2 else w, values, numbers)

    return _replaced(config, params, adapter, leaf)


def _merge(config: _Config, params: Params, adapter: Params) -> Params:
    def leaf(w: Any, values: Array, numbers: tuple[int, ...] | None) -> Array:
        return _placed(w, values, numbers).astype(w.dtype)

    return _replaced(config, params, adapter, leaf)


def _placed(w: Array, values: Array, numbers: tuple[int, ...] | None) -> Array:
    if _is_whole(w, numbers):
        return values
    return w.at[np.asarray(numbers)].set(values.astype(w.dtype))


def _replaced(config: _Config, params: Params, adapter: Params, leaf: Any) -> Params:
    named, layers = tree.flatten(params), trained_layers(config.target, params)
    leaves = {}
    for name, values in tree.flatten(adapter).items():
        if name not in layers:
            raise ValueError(
                f"the adapter has {name!r}, which the model does not, or {config.target!r} not match"
            )
        _refuse_quantised(name, named[name])
        leaves[name] = leaf(named[name], values, layers[name])
    return tree.replace(params, leaves)


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("partial", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are of another method.

    Raises:
        ValueError: a setting that is not known, an array of another shape than this model's.
    """
    return own_files.method_in(files, "partial", _Config, _method, params)

"""Files of methods that the PEFT library does not have: our names, and the method's own settings.

`adapter_config.json` says `"peft_type": "TRAINJAX"` and which method, so PEFT refuses it by name; the
tensors are called as they are here, `layers/attention/query/kernel/down`, with `frozen:` before those
that do not train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from trainjax import tree
from trainjax.types import Frozen, Params, Peft, PeftFiles

C = TypeVar("C")

_TYPE, _METHOD = "TRAINJAX", "trainjax_method"
_FROZEN = "frozen:"
_OF_THE_FOLDER = {"peft_type", _METHOD, "task_type", "base_model_name_or_path"}


def export(method: str, config: Any, adapter: Params) -> PeftFiles:
    """An adapter's files.

    Args:
        method: the name of the method's file in this package.
        config: a frozen dataclass of numbers, strings, tuples of them, None.
        adapter: nested dicts of arrays, and `Frozen` ones.
    """
    tensors: dict[str, np.ndarray] = {}
    trains = tree.flatten(tree.trainable(adapter))
    for name, value in tree.flatten(tree.thawed(adapter)).items():
        # Not ascontiguousarray, which makes a vector of a single number.
        tensors[name if name in trains else _FROZEN + name] = np.asarray(value, order="C")
    return PeftFiles({"peft_type": _TYPE, _METHOD: method} | dataclasses.asdict(config), tensors)


def read(files: PeftFiles, method: str, kind: type[C]) -> tuple[C, Params] | None:
    """The settings and the adapter in files of ours, or None if they are another method's.

    Raises:
        ValueError: a setting that the method does not have, or one that it misses; numbers that are
            not finite.
    """
    if files.fields.get("peft_type") != _TYPE or files.fields.get(_METHOD) != method:
        return None
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {key: value for key, value in files.fields.items() if key not in _OF_THE_FOLDER}
    for key in given:
        if key not in known:
            raise ValueError(
                f"the adapter's configuration sets {key}={given[key]!r}, which {method} does not "
                f"have; its settings are {', '.join(known)}"
            )
    if missing := [key for key in known if key not in given]:
        raise ValueError(f"the adapter's configuration of {method} has no {missing[0]}")
    leaves: dict[str, Any] = {}
    for name, tensor in files.tensors.items():
        if jnp.issubdtype(tensor.dtype, jnp.floating) and not np.isfinite(tensor).all():
            raise ValueError(f"the adapter's tensor {name!r} holds NaN or infinite numbers")
        value = jnp.asarray(tensor)
        bare = name.removeprefix(_FROZEN)
        leaves[bare] = value if bare == name else Frozen(value)
    return kind(**{key: _tuples(value) for key, value in given.items()}), tree.unflatten(leaves)


def _tuples(value: Any) -> Any:
    """The value with the lists that JSON makes of tuples as tuples again, which can be hashed."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def method_in(
    files: PeftFiles, method: str, kind: type[C], make: Callable[[C], Peft], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are another method's.

    Args:
        files: settings and tensors.
        method: the name of the method's file in this package.
        kind: of its settings.
        make: the method with such settings.
        params: the base, for the shapes.

    Raises:
        ValueError: as `read`; an array of another shape than this model's adapter has.
    """
    if (found := read(files, method, kind)) is None:
        return None
    config, adapter = found
    made = make(config)
    check_shapes(adapter, abstract(made.init, params))
    return made, adapter


def check_shapes(adapter: Params, expected: Params) -> None:
    """Refuses an adapter of another model.

    Args:
        adapter: as it was read.
        expected: what the method's `init` gives for this model, abstract arrays will do.

    Raises:
        ValueError: an array that the model's adapter does not have, or of another shape.
    """
    found, wanted = (tree.flatten(tree.thawed(t)) for t in (adapter, expected))
    for name in found.keys() | wanted.keys():
        there, here = (t[name].shape if name in t else None for t in (found, wanted))
        if there != here:
            raise ValueError(
                f"the adapter's {name} has the shape {there}, this model's has {here}; "
                "is the adapter for another model?"
            )


def abstract(init: Any, params: Params) -> Params:
    """Shapes and dtypes of the adapter that `init` makes for these params, without making it."""
    return jax.eval_shape(init, jax.random.key(0), params)

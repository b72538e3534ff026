"""What PEFT trains beside a method: copies of whole modules, and rows of the embedding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.ops.head import Tied
from trainjax.peft._ends import EMBEDDING, HEAD, parted, plain, with_head
from trainjax.peft._methods import method_of
from trainjax.types import Metrics, Params, Peft, PeftFiles

_STACK = "layers/"


@dataclasses.dataclass(frozen=True)
class _Config:
    method: Peft
    saved: str | None
    tokens: tuple[tuple[str, tuple[int, ...]], ...]


def beside(
    method: Peft,
    modules_to_save: str | None = None,
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = (),
) -> Peft:
    """A method, and beside it weights that train as they are: for new tokens, another head, the norms.

    The adapter is `{"method": ..., "saved": weights by name, "tokens": rows by name}`; the last two train in
    float32 from their values in the base. Of an embedding with trained rows the forward pass has a copy.

    Where embedding and head are tied, a saved copy of one leaves the other as it is, and a merged model has
    a head of its own; trained rows of the embedding are rows of the head too. Both as in PEFT.

    Args:
        method: `lora(...)` and the like.
        modules_to_save: regex over the names of weights that train whole, `^(embed|head|norm)/` say.
        trainable_token_indices: ids whose rows of the embedding train, or by name (`embed/embedding`,
            `head/kernel`) the ids of each.

    Raises:
        ValueError: nothing matches; a quantised matrix; an id that is no row; training with a method that
            has an optimizer's link of its own.

    Source: agrees with PEFT 0.21, `modules_to_save` and `trainable_token_indices` of its configurations.
    """
    ids = trainable_token_indices
    by_name = ids if isinstance(ids, Mapping) else {EMBEDDING: ids} if ids else {}
    tokens = tuple((name, tuple(own)) for name, own in by_name.items())
    return _method(_Config(method, modules_to_save, tokens))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind, own = functools.partial, config.method
    return Peft(
        bind(_init, config),
        bind(_attach, config),
        bind(_merge, config),
        bind(_export, config),
        None if own.penalty is None else bind(_penalty, own.penalty),
        None if own.transform is None else _no_transform,
        None if own.layers is None else bind(_layers, own.layers),
    )


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    """The method's own start, and weights as they are: of these nothing is drawn."""
    both = with_head(params)
    chosen = {} if config.saved is None else tree.select(both, config.saved)
    saved = {name: _float32(name, w) for name, w in chosen.items()}
    leaves, own = tree.flatten(both), _own_tokens(config, params)
    tokens = {name: _rows_of(name, leaves, ids) for name, ids in own.items()}
    return {
        "method": config.method.init(key, params),
        "saved": tree.unflatten(saved),
        "tokens": tree.unflatten(tokens),
    }


def _own_tokens(config: _Config, params: Params) -> dict[str, tuple[int, ...]]:
    """The ids by name; a tied head whose rows are to be the embedding's has none of its own."""
    tokens = dict(config.tokens)
    if HEAD not in tree.flatten(params) and tokens.get(HEAD) == tokens.get(EMBEDDING):
        tokens.pop(HEAD, None)
    return tokens


def _float32(name: str, w: Any) -> Array:
    if isinstance(w, Tied):
        return w.dense()
    if tree.is_weight(w):
        raise ValueError(
            f"{name} is a {type(w).__name__}, and a quantised matrix does not train; load the base "
            "unquantised, or leave it out"
        )
    return jnp.array(w, jnp.float32, copy=True)


def _rows_of(name: str, leaves: Mapping[str, Any], ids: Sequence[int]) -> Float[Array, "ids embed"]:
    w = leaves.get(name)
    if name not in (EMBEDDING, HEAD) or w is None:
        raise ValueError(f"{name!r} has no rows of tokens; {EMBEDDING} and {HEAD} have")
    entries = w.shape[0 if name == EMBEDDING else 1]
    if wrong := [number for number in ids if not 0 <= number < entries]:
        raise ValueError(f"token {wrong[0]} is no row of {name}, which has {entries}")
    index = np.asarray(ids)
    table = w.embedding if isinstance(w, Tied) else w
    rows = table[:, index].T if name == HEAD and table is w else table[index]
    return rows.astype(jnp.float32)


def _with_rows(name: str, w: Any, ids: Sequence[int], rows: Float[Array, "ids embed"]) -> Any:
    """An embedding or a head with other rows for some tokens."""
    index = np.asarray(ids)
    if isinstance(w, Tied):
        return Tied(_with_rows(EMBEDDING, w.embedding, ids, rows))
    if tree.is_weight(w):
        raise ValueError(f"{name} has an adapter already, and so no rows that train beside it")
    rows = rows.astype(w.dtype)
    return w.at[index].set(rows) if name == EMBEDDING else w.at[:, index].set(rows.T)


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    attached = config.method.attach(params, adapter["method"], key)
    return _replaced(config, attached, adapter, lambda w, values: values)


def _merge(config: _Config, params: Params, adapter: Params) -> Params:
    def leaf(w: Any, values: Array) -> Array:
        base = w.embedding if isinstance(w, Tied) else w
        return values.astype(base.dtype if isinstance(base, jax.Array) else jnp.float32)

    merged = config.method.merge(params, adapter["method"])
    return plain(_replaced(config, merged, adapter, leaf))


def _replaced(
    config: _Config, params: Params, adapter: Params, leaf: Callable[[Any, Array], Array]
) -> Params:
    saved, tokens = tree.flatten(adapter["saved"]), tree.flatten(adapter["tokens"])
    params = parted(params, [*saved, *(name for name in tokens if name == HEAD)])
    named, ids = tree.flatten(params), dict(config.tokens)
    if unknown := [name for name in (*saved, *tokens) if name not in named]:
        raise ValueError(f"the adapter has {unknown[0]!r}, which the model does not")
    leaves = {name: leaf(named[name], values) for name, values in saved.items()}
    leaves |= {name: _with_rows(name, named[name], ids[name], x) for name, x in tokens.items()}
    return tree.replace(params, leaves)


def _penalty(
    penalty: Callable[..., Any], adapter: Params, reports: Mapping[str, Array], rows: Array
) -> tuple[Array, Metrics]:
    return penalty(adapter["method"], reports, rows)


def _no_transform(steps: int, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    raise ValueError(
        "the method needs an optimizer of its own, which does not know of weights beside it; train it "
        "alone, or a method such as lora"
    )


def _layers(layers: Callable[[Params], Any], params: Params) -> dict[str, Any]:
    return {f"method/{name}": numbers for name, numbers in layers(params).items()}


# The format of the PEFT library: copies by the module's name, rows by that of PEFT's wrapper.

_ROWS = "token_adapter.trainable_tokens_delta"


def _tensor(name: str, module: str) -> str:
    """The checkpoint's name of one of our leaves."""
    return f"{module}.{'bias' if name.endswith('bias') else 'weight'}"


def _places(name: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The full names of a leaf's layers, and where in it they are."""
    for index in np.ndindex(*shape[:1] if name.startswith(_STACK) else ()):
        yield tree.numbered(name, index), index


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    fields, tensors = config.method.export(adapter["method"], modules)
    tensors, copied = dict(tensors), set(fields.get("modules_to_save") or ())
    for name, values in tree.flatten(adapter["saved"]).items():
        for full, index in _places(name, values.shape):
            value = np.asarray(values[index])
            value = value.T if name.endswith("kernel") else value
            tensors[_tensor(name, modules[full])] = np.ascontiguousarray(value)
            copied.add(modules[full])
    named = {modules[name]: list(ids) for name, ids in config.tokens}
    for name, rows in tree.flatten(adapter["tokens"]).items():
        tensors[f"{modules[name]}.{_ROWS}"] = np.asarray(rows)
    only = named.get(modules[EMBEDDING]) if len(named) == 1 else None
    own = {
        "modules_to_save": sorted(copied) or None,
        "trainable_token_indices": only or named or None,
    }
    return PeftFiles(fields | own, tensors)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they hold nothing beside a method's own.

    A layer of a stack that the file leaves out is copied from the base, and trains with the others.

    Args:
        files: settings, and tensors by `lm_head.weight` or `<module>.token_adapter.trainable_tokens_delta`.
        modules: PEFT's module for each of our leaves, by full name.
        params: the base.

    Raises:
        ValueError: as the method's own; a module without its tensor, a tensor that does not fit, a number
            that is not finite; embedding and head that are copied and yet tied.
    """
    fields, tensors = dict(files.fields), dict(files.tensors)
    listed = fields.pop("modules_to_save", None) or []
    indices = fields.pop("trainable_token_indices", None) or {}
    if not listed and not indices:
        return None
    leaves = tree.flatten(with_head(params))
    saved = _copies(listed, leaves, modules, tensors)
    # Rows are tied as their base is; a copy of a tied embedding is not.
    if fields.pop("ensure_weight_tying", False) and isinstance(leaves.get(HEAD), Tied):
        _check_apart(saved)
    tokens, rows = _rows_in(indices, leaves, modules, tensors)
    if (own := method_of(PeftFiles(fields, tensors), modules, params)) is None:
        return None
    method, adapter = own
    target = f"^({'|'.join(saved)})$" if saved else None
    config = _Config(method, target, tuple(tokens.items()))
    parts = {"saved": tree.unflatten(saved), "tokens": tree.unflatten(rows)}
    return _method(config), {"method": adapter, **parts}


def _check_apart(saved: Mapping[str, Any]) -> None:
    if saved.keys() & {EMBEDDING, HEAD}:
        raise ValueError(
            "the adapter's configuration sets ensure_weight_tying=True, and a copy of the embedding that "
            "stays one with the head is not supported; merge the adapter in PEFT"
        )


def _copies(
    listed: Sequence[str],
    leaves: Mapping[str, Any],
    modules: Mapping[str, str],
    tensors: dict[str, np.ndarray],
) -> dict[str, Array]:
    """The leaves that are copied whole, by PEFT's rule: the ends of modules' names are listed."""
    saved = {}
    for name, w in leaves.items():
        found: dict[tuple[int, ...], np.ndarray] = {}
        for full, index in _places(name, w.shape):
            module = modules.get(full, "")
            if not any(module.endswith(end) for end in listed):
                continue
            tensor = _tensor(name, module)
            if tensor not in tensors:
                raise ValueError(
                    f"modules_to_save names {module}, but the adapter has no {tensor!r}"
                )
            value = tensors.pop(tensor)
            value = value.T if name.endswith("kernel") else value
            found[index] = _checked(tensor, value, w.shape[len(index) :])
        if found:
            saved[name] = _stacked(name, w, found)
    return saved


def _stacked(name: str, w: Any, found: Mapping[tuple[int, ...], np.ndarray]) -> Array:
    """A leaf of the layers found, and of the base's where there are none."""
    is_whole = len(found) == len([*_places(name, w.shape)])
    values = np.empty(w.shape, np.float32) if is_whole else np.array(_float32(name, w))
    for index, value in found.items():
        values[index] = value
    return jnp.asarray(values)


def _rows_in(
    indices: Any,
    leaves: Mapping[str, Any],
    modules: Mapping[str, str],
    tensors: dict[str, np.ndarray],
) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    """The ids of trained rows by name, and the rows that are in the file."""
    by_end = indices if isinstance(indices, Mapping) else {modules[EMBEDDING]: indices}
    tokens, rows = {}, {}
    for name in (EMBEDDING, HEAD):
        ids = next((own for end, own in by_end.items() if modules[name].endswith(end)), None)
        if ids is None:
            continue
        start, tensor = _rows_of(name, leaves, ids), f"{modules[name]}.{_ROWS}"
        tokens[name] = tuple(ids)
        if tensor in tensors:
            rows[name] = jnp.asarray(_checked(tensor, tensors.pop(tensor), start.shape))
        elif not isinstance(leaves[name], Tied) or tokens[name] != tokens.get(EMBEDDING):
            raise ValueError(
                f"trainable_token_indices are {ids}, but the adapter has no {tensor!r}"
            )
    return tokens, rows


def _checked(tensor: str, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The tensor in float32, in our layout."""
    if value.shape != tuple(shape):
        raise ValueError(
            f"the adapter's {tensor}, laid out as here, is {value.shape}, the model's {tuple(shape)}; is "
            "the adapter for another model, or one to which tokens were added?"
        )
    value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"the adapter's {tensor} holds NaN or infinite numbers")
    return value

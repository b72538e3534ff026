"""A Linen module as a `FlaxModel`: its layers are intercepted where an adapter is attached."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from trainjax import tree
from trainjax.models import _products as products
from trainjax.models._flax import FlaxModel
from trainjax.models._layouts import Layout, Layouts, as_matrices, of_axes, of_conv, of_einsum
from trainjax.nn.dense import Dense
from trainjax.types import Params, Weight


def from_linen(
    module: nn.Module, variables: Mapping[str, Any], /, *inputs: Any, **settings: Any
) -> FlaxModel:
    """A Linen module and its variables as a model for adapters, losses and estimates.

    The module is traced once, on shapes alone, to learn what its layers do with their kernels. Adapters go
    on the kernels of `nn.Dense`, `DenseGeneral`, `Conv` and `Einsum`, also within attention, `nn.scan`,
    `nn.vmap` and `nn.remat`; biases, scales and embeddings are params as they are.

    Batch statistics stay as they are while a loss trains (`model.updated` gives new ones). A loss that
    normalises by its own batch (`train=True`) is no longer a sum over examples, so there accumulation
    changes the result.

    Args:
        module: any.
        variables: as `module.init` returns them: `params`, and other collections if there are.
        *inputs: an example of what the module takes: arrays, or `jax.ShapeDtypeStruct`s.
        **settings: keywords of its `__call__`, such as `train=False`.

    Raises:
        ValueError: variables without `params`.

    >>> layer = nn.DenseGeneral((2, 3), axis=(-2, -1))
    >>> x = jax.numpy.ones((1, 4, 5))
    >>> model = from_linen(layer, layer.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jax.numpy.shape, model.params)
    {'bias': (2, 3), 'kernel': (20, 6)}
    """
    if "params" not in variables:
        raise ValueError(
            f"variables have the collection 'params', as module.init returns them; these have "
            f"{sorted(variables)}"
        )
    plain = nn.meta.unbox(flax.core.unfreeze(dict(variables)))
    params = plain.pop("params")
    program = Linen(module, _met(module, params, plain, inputs, settings))
    return FlaxModel(as_matrices(params, program.layouts), plain, program)


@dataclasses.dataclass(frozen=True, eq=False)  # a module may have fields that have no hash
class Linen:
    """A Linen module as a `Program`."""

    module: nn.Module
    layouts: Layouts

    def run(
        self,
        params: Params,
        state: Params,
        key: PRNGKeyArray | None,
        inputs: tuple[Any, ...],
        settings: Mapping[str, Any],
    ) -> tuple[Any, Params]:
        with nn.intercept_methods(functools.partial(_with_weights, self.layouts)):
            outputs, changed = self.module.apply(
                {"params": params, **state},
                *inputs,
                rngs=_streams(key),
                mutable=list(state),
                **settings,
            )
        return outputs, {**state, **changed}

    def to_flax(self, params: Params, state: Params) -> Any:
        return {"params": params, **state}


def _streams(key: PRNGKeyArray | None) -> dict[str, PRNGKeyArray]:
    """A key for each stream; Linen takes that of `params` for names that are not there."""
    if key is None:
        return {}
    return {name: tree.key_for(key, name) for name in ("params", "dropout")}


# --- what a layer does with its kernel ------------------------------------------------------------


class _Kind(NamedTuple):
    """A class of layers.

    Attributes:
        layer: the class.
        layout: `(layer, shape of the kernel, arguments of the call) -> layout or reason`.
        call: `(layer, layout, w, arguments of the call)` computes the layer with `w`.
    """

    layer: type[nn.Module]
    layout: Callable[..., Layout | str]
    call: Callable[..., Array] | None


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _dense_layout(layer: Any, shape: tuple[int, ...], *args: Any) -> Layout | str:
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        return "its layer has a dot_general of its own"
    if isinstance(layer, nn.Dense):
        return of_axes(shape, 0, 1)
    return of_axes(shape, len(_tuple(layer.batch_dims)), len(_tuple(layer.axis)))


def _dense(layer: Any, layout: Layout, w: Weight, x: ArrayLike) -> Array:
    def dot_general(x: Array, w: Weight, dimensions: Any, precision: Any = None) -> Array:
        (axes, _), (batch, _) = dimensions
        return products.dot_general(layout, x, w, axes, batch, precision)

    return _own_call(layer, w, x, dot_general=dot_general)


def _conv_layout(layer: Any, shape: tuple[int, ...], *args: Any) -> Layout | str:
    if layer.mask is not None:
        return "its layer masks its kernel"
    if layer.conv_general_dilated_cls is not None:
        return "its layer has a conv_general_dilated_cls"
    return of_conv(shape, layer.feature_group_count)


def _conv(layer: Any, layout: Layout, w: Weight, x: ArrayLike) -> Array:
    own = layer.conv_general_dilated or lax.conv_general_dilated

    def convolve(x: Array, w: Weight, strides: Any, padding: Any, **settings: Any) -> Array:
        settings |= {"window_strides": strides, "padding": padding}
        return products.conv(layout, own, x, w, **settings)

    return _own_call(layer, w, x, conv_general_dilated=convolve)


def _own_call(layer: Any, w: Weight, x: ArrayLike, **product: Any) -> Array:
    """The layer as it is but for its product, which it hands `w` instead of a kernel."""
    promote_dtype = layer.promote_dtype

    def promoted(x: ArrayLike, kernel: Any, bias: Array | None, *, dtype: Any) -> tuple[Any, ...]:
        x, _, bias = promote_dtype(x, products.stand_in(w), bias, dtype=dtype)
        return x, w, bias

    params = {"kernel": ()}  # Linen compares shapes leaf by leaf, and here are no leaves
    if layer.use_bias:
        params["bias"] = layer.get_variable("params", "bias")
    free = layer.clone(parent=None, promote_dtype=promoted, **product)
    return free.apply({"params": params}, x)


def _equation(layer: Any, equation: str | None) -> str:
    return (layer.einsum_str or equation or "").replace(" ", "")


def _einsum_layout(
    layer: Any, shape: tuple[int, ...], x: Any, einsum_str: str | None = None
) -> Layout | str:
    return of_einsum(_equation(layer, einsum_str), shape)


def _einsum(layer: Any, layout: Layout, w: Weight, x: Any, einsum_str: str | None = None) -> Array:
    """The whole layer: this one of Linen's has no place for a product of ours."""
    equation = _equation(layer, einsum_str)
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    x, _, bias = layer.promote_dtype(x, products.stand_in(w), bias, dtype=layer.dtype)
    y = products.einsum(layout, equation, x, w, layer.precision)
    if layer.preferred_element_type is not None:
        y = y.astype(layer.preferred_element_type)
    return y if bias is None else y + bias.reshape(_bias_shape(layout, equation, y.ndim))


def _bias_shape(layout: Layout, equation: str, ndim: int) -> list[int]:
    """The bias has the output's axes that are the kernel's too; the others are 1."""
    _, kernel, out = products.letters(equation)
    sizes = dict(zip(kernel, layout.shape, strict=True))
    hidden = ndim - len(out.replace("...", ""))
    out = out.replace("...", "." * hidden)
    return [sizes.get(c, 1) for c in out]


def _matrix_layout(layer: Any, shape: tuple[int, ...], *args: Any) -> Layout | str:
    return of_axes(shape, 0, 1)


def _method(layer: type[nn.Module]) -> Callable[..., Any]:
    return inspect.unwrap(layer.__call__)


_KINDS = {
    _method(kind.layer): kind
    for kind in (
        _Kind(nn.Dense, _dense_layout, _dense),
        _Kind(nn.DenseGeneral, _dense_layout, _dense),
        _Kind(nn.Conv, _conv_layout, _conv),
        _Kind(nn.Einsum, _einsum_layout, _einsum),
        _Kind(Dense, _matrix_layout, None),  # it knows weights by itself
    )
}


def _kind(context: Any) -> _Kind | None:
    """By the function that runs, not by the class: a subclass may do something else around it."""
    kind = _KINDS.get(inspect.unwrap(context.orig_method.func))
    return kind if kind and isinstance(context.module, kind.layer) else None


# --- interception ---------------------------------------------------------------------------------


def _name(layer: nn.Module) -> str:
    return "/".join((*layer.path, "kernel"))


def _has_kernel(layer: nn.Module, params: Mapping[str, Any]) -> bool:
    """Not of a module that the user's applies with params of its own, which has a path of its own."""
    return layer.has_variable("params", "kernel") and _name(layer) in params


def _with_weights(
    layouts: Layouts, call: Callable[..., Any], args: Any, settings: Any, context: Any
) -> Any:
    """Computes the layers whose kernel is a `Weight`; all others are called as they are."""
    kind, layer = _kind(context), context.module
    if kind is None or kind.call is None:
        return call(*args, **settings)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, Weight):
        return call(*args, **settings)
    return kind.call(layer, layouts[_name(layer)], kernel, *args, **settings)


def _met(
    module: nn.Module, params: Params, state: Params, inputs: Any, settings: Mapping[str, Any]
) -> Layouts:
    """The layouts of the kernels that the module computes with, from a trace on shapes alone."""
    found: dict[str, Layout | str] = {}
    whole = tree.flatten(params)

    def note(call: Callable[..., Any], args: Any, settings: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and _has_kernel(layer, whole):
            shape = layer.get_variable("params", "kernel").shape
            layout = _layout(context, shape, whole[_name(layer)].shape, args, settings)
            if found.setdefault(_name(layer), layout) != layout:
                found[_name(layer)] = "layers that share it read it in different ways"
        return call(*args, **settings)

    def run(params: Params, state: Params, arrays: list[Any]) -> Any:
        inputs, settings = restore(arrays)
        with nn.intercept_methods(note):
            variables = {"params": params, **state}
            rngs = _streams(jax.random.key(0))
            return module.apply(variables, *inputs, rngs=rngs, mutable=list(state), **settings)

    arrays, restore = _apart((inputs, settings))
    jax.eval_shape(run, params, state, arrays)
    return found


def _layout(
    context: Any, shape: tuple[int, ...], whole: tuple[int, ...], args: Any, settings: Any
) -> Layout | str:
    """The layout of the kernel of the layer that is called; inside of lifted axes, if it has such."""
    kind, layer = _kind(context), context.module
    if kind is None:
        return f"its layer is a {type(layer).__name__}, which computes in a way of its own"
    if whole[len(whole) - len(shape) :] != shape:
        return (
            f"nn.scan or nn.vmap has its layers in another axis than the first: it is {whole} and a "
            f"layer's {shape}"
        )
    return kind.layout(layer, shape, *args, **settings)


def _apart(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What has a shape, to be traced, and how to put it back among what is Python's (`train=True`)."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def restore(arrays: list[Any]) -> Any:
        filled = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[place] for place in places], restore

"""An NNX module as a `FlaxModel`: its layers keep their code and get another product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from trainjax import tree
from trainjax.models import _products as products
from trainjax.models._flax import FlaxModel
from trainjax.models._layouts import Layout, Layouts, as_matrices, of_axes, of_conv, of_einsum
from trainjax.types import Params, Weight, pytree


def from_nnx(module: nnx.Module, /) -> FlaxModel:
    """An NNX module as a model for adapters, losses and estimates; the module itself is not changed.

    Adapters go on the kernels of `nnx.Linear`, `LinearGeneral`, `Conv` and `Einsum`, also within attention;
    every `nnx.Param` is a param, named by its path. All else (batch statistics, keys, counters) is the
    model's `state`. Whether it is in the mode of training is the module's as it comes (`module.train()`,
    `module.eval()`).

    Batch statistics stay as they are while a loss trains (`model.updated` gives new ones). A module in the
    mode of training normalises by its own batch: its loss is no longer a sum over examples, so there
    accumulation changes the result.

    Args:
        module: any.

    >>> model = from_nnx(nnx.Conv(3, 8, (5, 5), rngs=nnx.Rngs(0)))
    >>> jax.tree.map(jax.numpy.shape, model.params)
    {'bias': (8,), 'kernel': (75, 8)}
    """
    opened = nnx.clone(module)
    arrays = _by_name(nnx.state(opened, nnx.Param))
    layouts = _open(opened, arrays)
    graph, (params, state) = nnx.graphdef(opened), nnx.state(opened, nnx.Param, ...)
    keys = tuple(_name(path) for path, v in nnx.to_flat_state(state) if isinstance(v, nnx.RngKey))
    program = Nnx(nnx.graphdef(module), graph, {**_paths(params), **_paths(state)}, keys, layouts)
    return FlaxModel(
        as_matrices(tree.unflatten(arrays), layouts), tree.unflatten(_by_name(state)), program
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Nnx:
    """An NNX module as a `Program`.

    Attributes:
        own: the module without its arrays.
        graph: the same, with layers that take a `Weight` for a kernel.
        paths: in the module, by name.
        keys: names of the random keys in the state.
        layouts: of its kernels.
    """

    own: Any
    graph: Any
    paths: Mapping[str, tuple[Any, ...]]
    keys: tuple[str, ...]
    layouts: Layouts

    def run(
        self,
        params: Params,
        state: Params,
        key: PRNGKeyArray | None,
        inputs: tuple[Any, ...],
        settings: Mapping[str, Any],
    ) -> tuple[Any, Params]:
        before = tree.flatten(state)
        module = self._merged(self.graph, params, before | self._fresh(before, key))
        outputs = module(*inputs, **settings)
        after = _by_name(nnx.state(module, nnx.Not(nnx.Param)))
        kept = {name: before[name] if name in self.keys else after[name] for name in before}
        return outputs, tree.unflatten(kept)

    def to_flax(self, params: Params, state: Params) -> Any:
        return self._merged(self.own, params, tree.flatten(state))

    def _merged(self, graph: Any, params: Params, state: Mapping[str, Any]) -> Any:
        leaves = {**tree.flatten(params), **state}
        flat = [
            (self.paths[name], _Whole(leaf) if isinstance(leaf, Weight) else leaf)
            for name, leaf in leaves.items()
        ]
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def _fresh(self, state: Mapping[str, Any], key: PRNGKeyArray | None) -> dict[str, Any]:
        """The module's random keys made from `key`, each from its name."""
        if key is None:
            return {}
        shapes = {name: state[name].shape for name in self.keys}
        drawn = {name: tree.key_for(key, name) for name in self.keys}
        return {
            name: jax.random.split(drawn[name], s) if s else drawn[name]
            for name, s in shapes.items()
        }


@pytree
class _Whole:
    """What a layer finds in its kernel's place, and reads with `kernel[...]`."""

    weight: Weight

    def __getitem__(self, index: Any) -> Weight:
        return self.weight


def _name(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _paths(state: Any) -> dict[str, tuple[Any, ...]]:
    return {_name(path): path for path, _ in nnx.to_flat_state(state)}


def _by_name(state: Any) -> dict[str, Any]:
    """The arrays by name. One that is no variable (a mask) is there as it is."""
    return {
        _name(path): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


# --- layers with another product ------------------------------------------------------------------


def _open(module: nnx.Module, arrays: Mapping[str, Array]) -> dict[str, Layout | str]:
    """Gives the module's layers a product that takes a `Weight`; the layouts of its kernels by name."""
    layers = {_name((*path, "kernel")): layer for path, layer in nnx.iter_modules(module)}
    layouts = {name: _opened(layer) for name, layer in layers.items()}
    return {name: _checked(layouts[name], arrays[name].shape) for name in arrays if name in layouts}


def _opened(layer: Any) -> Layout | str:
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
    if kind is None:
        return f"its layer is a {type(layer).__name__}, which computes in a way of its own"
    layout, attribute, product = _KINDS[kind](layer)
    if isinstance(layout, Layout):
        setattr(layer, attribute, product)
        layer.promote_dtype = _Promote(layer.promote_dtype)
    return layout


def _checked(layout: Layout | str, whole: tuple[int, ...]) -> Layout | str:
    if isinstance(layout, str) or whole[len(whole) - len(layout.shape) :] == layout.shape:
        return layout
    return (
        f"its layers are stacked in another axis than the first: it is {whole} and a layer's "
        f"{layout.shape}"
    )


@dataclasses.dataclass(frozen=True)
class _Promote:
    """A layer's `promote_dtype`, which a `Weight` goes through as it is."""

    own: Callable[..., Any]

    def __call__(self, arrays: tuple[Any, ...], *, dtype: Any = None) -> tuple[Any, ...]:
        x, kernel, *rest = arrays
        if not isinstance(kernel, Weight):
            return self.own(arrays, dtype=dtype)
        x, _, *rest = self.own((x, products.stand_in(kernel), *rest), dtype=dtype)
        return (x, kernel, *rest)


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A layer's `dot_general`, or ours where the kernel is a `Weight`."""

    layout: Layout
    own: Callable[..., Array]

    def __call__(self, x: Array, kernel: Any, dimensions: Any, **settings: Any) -> Array:
        if not isinstance(kernel, Weight):
            return self.own(x, kernel, dimensions, **settings)
        (axes, _), (batch, _) = dimensions
        precision, kind = _settings(**settings)
        y = products.dot_general(self.layout, x, kernel, axes, batch, precision)
        return y if kind is None else y.astype(kind)


@dataclasses.dataclass(frozen=True)
class _Einsum:
    """A layer's `einsum_op`, or ours where the kernel is a `Weight`."""

    layout: Layout
    own: Callable[..., Array]

    def __call__(self, equation: str, x: Array, kernel: Any, **settings: Any) -> Array:
        if not isinstance(kernel, Weight):
            return self.own(equation, x, kernel, **settings)
        precision, kind = _settings(**settings)
        y = products.einsum(self.layout, equation, x, kernel, precision)
        return y if kind is None else y.astype(kind)


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A layer's `conv_general_dilated`, or ours where the kernel is a `Weight`."""

    layout: Layout
    own: Callable[..., Array]

    def __call__(
        self, x: Array, kernel: Any, window_strides: Any, padding: Any, **settings: Any
    ) -> Array:
        if not isinstance(kernel, Weight):
            return self.own(x, kernel, window_strides, padding, **settings)
        settings |= {"window_strides": window_strides, "padding": padding}
        return products.conv(self.layout, self.own, x, kernel, **settings)


def _settings(
    *, precision: Any = None, preferred_element_type: Any = None, out_sharding: Any = None
) -> tuple[Any, Any]:
    if out_sharding is not None:
        raise ValueError(
            f"out_sharding={out_sharding} of a layer with an adapter is not supported; constrain its output"
        )
    return precision, preferred_element_type


_Opening = tuple[Layout | str, str, Callable[..., Array] | None]
"""The kernel's layout, the attribute of the layer that makes the product, and the one to put there."""


def _linear(layer: Any) -> _Opening:
    if layer.dot_general not in (None, lax.dot_general):
        return "its layer has a dot_general of its own", "", None
    layout = of_axes((layer.in_features, layer.out_features), 0, 1)
    return layout, "dot_general", _Dot(layout, lax.dot_general)


def _linear_general(layer: Any) -> _Opening:
    if layer.dot_general not in (None, lax.dot_general) or layer.dot_general_cls is not None:
        return "its layer has a dot_general of its own", "", None
    shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    layout = of_axes(shape, len(layer.batch_axis), len(layer.in_features))
    return layout, "dot_general", _Dot(layout, lax.dot_general)


def _conv(layer: Any) -> _Opening:
    if layer.mask is not None:
        return "its layer masks its kernel", "", None
    layout = of_conv(layer.kernel_shape, layer.feature_group_count)
    return layout, "conv_general_dilated", _Conv(layout, layer.conv_general_dilated)


def _einsum(layer: Any) -> _Opening:
    if layer.einsum_str is None:
        return "its layer is told the equation only when it is called", "", None
    layout = of_einsum(layer.einsum_str, layer.kernel_shape)
    if isinstance(layout, str):
        return layout, "", None
    return layout, "einsum_op", _Einsum(layout, layer.einsum_op)


_KINDS: dict[type, Callable[[Any], _Opening]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.Einsum: _einsum,
}

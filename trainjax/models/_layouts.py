"""How the kernels of a Flax layer are read as matrices, which is what adapters know.

A kernel may have many axes: `[height, width, in, out]` of a convolution, `[in, heads, head_dim]` of
attention. They are of three kinds, by what the layer does with them: those that go along with the
input's (a matrix for each place), those that are summed over, and those that are new in the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from trainjax import tree
from trainjax.types import Params, Weight


class Layout(NamedTuple):
    """A kernel as a stack of matrices `[*batch, in, out]`.

    Attributes:
        shape: of the kernel in the layer. An array of the params may have leading axes before these, of
            layers that are scanned or vmapped.
        split: the shape in which the output of a grouped convolution is `groups` and `out`; else `shape`.
        batch, inner, outer: axes of `split` that are shared with the input, summed over, and new.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    batch: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.split[axis] for axis in axes)

    def to_matrix(self, kernel: Array) -> Array:
        """The kernel's numbers as `[*lifted, *batch, in, out]`."""
        lifted = kernel.shape[: kernel.ndim - len(self.shape)]
        order = tuple(axis + len(lifted) for axis in (*self.batch, *self.inner, *self.outer))
        split = kernel.reshape(*lifted, *self.split).transpose(*range(len(lifted)), *order)
        sides = math.prod(self.sizes(self.inner)), math.prod(self.sizes(self.outer))
        return split.reshape(*lifted, *self.sizes(self.batch), *sides)

    def to_kernel(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`."""
        lifted = matrix.shape[: matrix.ndim - 2 - len(self.batch)]
        axes = (*self.batch, *self.inner, *self.outer)
        back = tuple(axes.index(axis) + len(lifted) for axis in range(len(axes)))
        split = matrix.reshape(*lifted, *self.sizes(axes)).transpose(*range(len(lifted)), *back)
        return split.reshape(*lifted, *self.shape)


Layouts = Mapping[str, "Layout | str"]
"""By the kernel's name: its layout, or why it has none."""


def of_axes(shape: Sequence[int], num_batch: int, num_inner: int) -> Layout:
    """The layout of a kernel `[*batch, *in, *out]`."""
    axes, inner = tuple(range(len(shape))), num_batch + num_inner
    shape = tuple(shape)
    return Layout(shape, shape, axes[:num_batch], axes[num_batch:inner], axes[inner:])


def of_conv(shape: Sequence[int], groups: int) -> Layout:
    """The layout of a kernel `[*window, in / groups, out]`: a matrix for each group, one if there is one."""
    *window, fan_in, fan_out = shape
    if groups == 1:
        return of_axes(shape, 0, len(shape) - 1)
    last = len(shape)
    split = (*window, fan_in, groups, fan_out // groups)
    return Layout(tuple(shape), split, (last - 1,), tuple(range(last - 1)), (last,))


def of_einsum(equation: str, shape: Sequence[int]) -> Layout | str:
    """The layout of the second operand of an einsum, or why it is no matrix."""
    x, kernel, out = letters(equation)
    if "..." in kernel:
        return f"the kernel of {equation!r} has an ellipsis"
    if len(set(kernel)) < len(kernel) or len(set(x)) < len(x.replace("...", ".")) - x.count("..."):
        return f"{equation!r} takes a diagonal"
    if alone := sorted(set(kernel) - set(x) - set(out)) + sorted(set(x) - set(kernel) - set(out)):
        return f"{equation!r} sums over {alone[0]!r} of one operand alone"
    places = {letter: axis for axis, letter in enumerate(kernel)}
    batch = tuple(places[c] for c in kernel if c in x and c in out)
    inner = tuple(places[c] for c in kernel if c in x and c not in out)
    outer = tuple(places[c] for c in kernel if c not in x)
    return Layout(tuple(shape), tuple(shape), batch, inner, outer)


def letters(equation: str) -> tuple[str, str, str]:
    """The three terms of `x,kernel->out`."""
    operands, out = equation.replace(" ", "").split("->")
    x, kernel = operands.split(",")
    return x, kernel, out


def as_matrices(params: Params, layouts: Layouts) -> Params:
    """The params with every kernel that has a layout as a stack of matrices."""

    def leaf(name: str, value: Any) -> Any:
        layout = layouts.get(name)
        return layout.to_matrix(value) if isinstance(layout, Layout) else value

    return tree.map_named(leaf, params)


def as_kernels(params: Params, layouts: Layouts) -> Params:
    """The inverse of `as_matrices`; a `Weight` stays as it is.

    Raises:
        ValueError: a `Weight` in the place of an array that has no layout.
    """

    def leaf(name: str, value: Any) -> Any:
        layout = layouts.get(name, "no layer of Flax that computes with it was met")
        if isinstance(value, Weight):
            if isinstance(layout, Layout):
                return value
            raise ValueError(
                f"{name!r} cannot have an adapter: {layout}; give the method a target that leaves it out"
            )
        return layout.to_kernel(value) if isinstance(layout, Layout) else value

    return tree.map_named(leaf, params)

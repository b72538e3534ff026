"""Bottleneck adapters: a small network with a residual after a layer's output projection."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dot, matmul
from trainjax.peft import _own_files as own_files
from trainjax.peft._matrices import drawn, replaced, targets
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree, static

HOULSBY = r"attention/output|mlp/down"
PFEIFFER = r"mlp/down"

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""The nonlinearities, by the names that an adapter's files have for them."""

_AXES = {"down": ("out", None), "down_bias": (None,), "up": (None, "out"), "up_bias": ("out",)}


@pytree
class Bottleneck(Weight):
    """`y + activation(y @ down + down_bias) @ up + up_bias` with `y = x @ w + bias`.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        bias: of the layer itself, which the adapter comes after; None where it has none.
        down, down_bias, up, up_bias: the adapter, with the same leading axes.
        activation: one of `ACTIVATIONS`, by name.
    """

    w: Any
    bias: Float[Array, "*stack out"] | None
    down: Float[Array, "*stack out size"]
    down_bias: Float[Array, "*stack size"]
    up: Float[Array, "*stack size out"]
    up_bias: Float[Array, "*stack out"]
    activation: str = static("gelu")

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        y = matmul(x, self.w)
        if self.bias is not None:
            y += self.bias.astype(y.dtype)
        inner = dot(y, self.down.astype(y.dtype), 1, 0).astype(jnp.float32) + self.down_bias
        inner = ACTIVATIONS[self.activation](inner).astype(y.dtype)
        return y + dot(inner, self.up.astype(y.dtype), 1, 0) + self.up_bias.astype(y.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        """No matrix computes a nonlinearity.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_MERGE)


_NO_MERGE = (
    "a bottleneck adapter cannot be merged: no matrix has its nonlinearity; keep it as an adapter"
)


@dataclasses.dataclass(frozen=True)
class _Config:
    bottleneck_size: int
    target: str
    activation: str


def bottleneck(
    bottleneck_size: int = 64, target: str = HOULSBY, *, activation: str = "gelu"
) -> Peft:
    """`y + f(y D + d) U + u` after the matrices that match `target`, with `y` the layer's output.

    `D` starts uniform in `±1/sqrt(out)`, `U` and both biases at zero, so the adapter starts as the
    identity. It sees the layer's output with its bias and before the residual stream is added.

    Costs `2 * out * bottleneck_size + out + bottleneck_size` numbers a matrix, and about as many
    multiplications a token in the forward pass, in generation too: it does not merge.

    Args:
        bottleneck_size: width of the adapter's inner layer; 16 to 64 are usual.
        target: regex over parameter names. `HOULSBY`, the default, is after attention and after the
            feed-forward; `PFEIFFER` after the feed-forward alone (Pfeiffer et al. 2020, arXiv:2005.00247,
            whose norms around the adapter are those of the base here).
        activation: a name in `ACTIVATIONS`: gelu, relu, silu; computed in float32.

    Raises:
        ValueError: a size below 1, an unknown activation, a regex that matches nothing, or the head.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; there `U` starts near zero, not at it,
    and the norms train too.
    """
    if bottleneck_size < 1:
        raise ValueError(f"bottleneck_size={bottleneck_size}: the inner layer has at least 1 unit")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return _method(_Config(bottleneck_size, target, activation))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    bind = functools.partial
    return Peft(bind(_init, config), bind(_attach, config), _merge, bind(_export, config))


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    found = targets(params, config.target)
    if "head/kernel" in found:
        raise ValueError(
            "the output head is a matrix, and logits of a bottleneck after it are none; leave it out of "
            f"the target: {HOULSBY!r}"
        )
    return drawn(key, found, functools.partial(_parts, config.bottleneck_size), _AXES)


def _parts(size: int, key: PRNGKeyArray, name: str, w: Any) -> dict[str, Array]:
    *stack, _, out = w.shape
    bound = out**-0.5
    down = jax.random.uniform(key, (*stack, out, size), jnp.float32, -bound, bound)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return {
        "down": down,
        "down_bias": zeros((*stack, size)),
        "up": zeros((*stack, size, out)),
        "up_bias": zeros((*stack, out)),
    }


def _attach(
    config: _Config, params: Params, adapter: Params, key: PRNGKeyArray | None = None
) -> Params:
    """Nothing of it is random: the key has no effect.

    A layer adds its bias after the product, and the adapter comes after both: so the weight takes
    the bias over, and zeros stay in its place.
    """
    named = tree.flatten(params)
    taken: dict[str, Array] = {}

    def leaf(name: str, w: Any, parts: Mapping[str, Array]) -> Bottleneck:
        own = name.removesuffix("kernel") + "bias"
        if own in named:
            taken[own] = jnp.zeros_like(named[own])
        return Bottleneck(w, named.get(own), **parts, activation=config.activation)

    return tree.replace(replaced(params, adapter, leaf), taken)


def _merge(params: Params, adapter: Params) -> Params:
    raise ValueError(_NO_MERGE)


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("bottleneck", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are of another method.

    Raises:
        ValueError: a setting that is not known, an array of another shape than this model's.
    """
    return own_files.method_in(files, "bottleneck", _Config, _method, params)

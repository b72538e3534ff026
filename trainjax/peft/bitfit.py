"""BitFit: the biases train, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import matmul
from trainjax.peft import _own_files as own_files
from trainjax.peft._matrices import ALL_LINEAR, drawn, targets
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree

_ADDED = "kernel/bias"
"""How the name of a bias ends that the model itself does not have: it lies below its matrix."""


@pytree
class Biased(Weight):
    """`x @ w + bias`: a matrix of an architecture without biases, with one.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        bias: what is added, with the same leading axes.
    """

    w: Any
    bias: Float[Array, "*stack out"]

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return matmul(x, self.w) + self.bias.astype(x.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        """No matrix adds a bias.

        Raises:
            ValueError: always.
        """
        raise ValueError("a matrix with an added bias cannot be merged into a matrix")


@dataclasses.dataclass(frozen=True)
class _Config:
    target: str
    add: bool | None


def bitfit(target: str = ALL_LINEAR, *, add: bool | None = None) -> Peft:
    """Trains `bias` in `x W + bias`, in the layers that match `target`, in float32.

    Llama has no biases (Qwen2 has those of queries, keys and values). By default a model that has none
    among the targets gets one at each targeted matrix, at zero, and a model that has some trains those.
    What was added does not merge: the architecture has no place for it.

    Costs one number for each output of a matrix, one addition a layer where a bias is added, and no
    product of matrices beyond the frozen model's.

    Args:
        target: regex over the names of biases and of the matrices beside them, such as
            `layers/attention/query/kernel` or `.../bias`. The paper's smaller set, the biases of queries
            and of the feed-forward's inner layer, is `query|up`.
        add: give every targeted matrix without a bias one (True), none (False), or as said above (None).

    Raises:
        ValueError: nothing matches; no biases there, and `add` is False; a bias added to `head`.

    Source: Ben Zaken et al. 2021, arXiv:2106.10199, section 3, where the task's classifier trains too. The
    biases of norms count, where a norm has one.
    """
    return _method(_Config(target, add))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    return Peft(
        functools.partial(_init, config), _attach, _merge, functools.partial(_export, config)
    )


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    biases, bare = _targets(config, params)
    add = not biases if config.add is None else config.add
    if not biases and not add:
        raise ValueError(
            f"the model has no bias that target={config.target!r} matches, as Llama has none; "
            "add=True gives each matrix one"
        )
    found = {name: jnp.asarray(bias, jnp.float32) for name, bias in biases.items()}
    if add and bare:
        found |= tree.flatten(drawn(key, _checked(bare), _zeros, {"bias": ("out",)}))
    return tree.unflatten(found)


def _targets(config: _Config, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """The biases, and the matrices that have none, that the pattern matches."""
    named, pattern = tree.flatten(params), tree.regex(config.target)

    def matches(layer: str) -> bool:
        return any(pattern.search(layer + leaf) for leaf in ("kernel", "bias"))

    kinds: dict[str, dict[str, Any]] = {"bias": {}, "kernel": {}}
    for name, leaf in named.items():
        for kind, found in kinds.items():
            layer = name.removesuffix(kind)
            if layer != name and layer[-1:] in ("", "/") and matches(layer):
                found[name] = leaf
    if not any(kinds.values()):
        targets(params, config.target)  # says which names there are
    bare = {
        n: w for n, w in kinds["kernel"].items() if n.removesuffix("kernel") + "bias" not in named
    }
    return kinds["bias"], bare


def _checked(bare: dict[str, Any]) -> dict[str, Any]:
    if "head/kernel" in bare:
        raise ValueError(
            "the output head is a matrix without a bias in every part of trainjax; leave it out of "
            "the target: '^layers/'"
        )
    return bare


def _zeros(key: PRNGKeyArray, name: str, w: Any) -> dict[str, Array]:
    return {"bias": jnp.zeros((*w.shape[:-2], w.shape[-1]), jnp.float32)}


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    """Nothing of it is random: the key has no effect."""
    named, leaves = tree.flatten(params), {}
    for name, bias in tree.flatten(adapter).items():
        matrix = name.removesuffix("/bias")
        if name.endswith(_ADDED) and matrix in named:
            leaves[matrix] = Biased(named[matrix], bias)
        else:
            leaves[_known(name, named)] = bias
    return tree.replace(params, leaves)


def _merge(params: Params, adapter: Params) -> Params:
    named, leaves = tree.flatten(params), {}
    for name, bias in tree.flatten(adapter).items():
        if name.endswith(_ADDED):
            raise ValueError(
                f"the bias added to {name.removesuffix('/bias')} cannot be merged: the architecture has "
                "no bias there (config.json's attention_bias and mlp_bias say so); keep it as an adapter"
            )
        leaves[name] = bias.astype(named[_known(name, named)].dtype)
    return tree.replace(params, leaves)


def _known(name: str, named: Mapping[str, Any]) -> str:
    if name not in named:
        raise ValueError(f"the adapter has {name!r}, which the model does not")
    return name


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    return own_files.export("bitfit", config, adapter)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in files of ours, or None if they are of another method.

    Raises:
        ValueError: a setting that is not known, an array of another shape than this model's.
    """
    return own_files.method_in(files, "bitfit", _Config, _method, params)

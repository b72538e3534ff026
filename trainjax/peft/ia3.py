"""(IA)³: learned vectors that scale keys, values and the feed-forward's inner activations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.ops.matmul import dense, matmul
from trainjax.peft._low_rank import WITHOUT_EFFECT, refuse_unknown
from trainjax.peft._matrices import drawn, grouped, merged, replaced, targets
from trainjax.types import Params, Peft, PeftFiles, Weight, pytree

_TARGET, _FEEDFORWARD = r"attention/(key|value)|mlp/down", r"mlp/down"


@pytree
class Ia3(Weight):
    """`((x * inputs) @ w) * outputs`: a matrix whose inputs or outputs are scaled, in float32.

    Attributes:
        w: the frozen matrix, an array or another `Weight`, with any leading axes (layers, experts).
        inputs, outputs: the scales, with the same leading axes; None for those that stay.
    """

    w: Any
    inputs: Float[Array, "*stack in"] | None = None
    outputs: Float[Array, "*stack out"] | None = None

    def __rmatmul__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return _scaled(matmul(_scaled(x, self.inputs), self.w), self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Float[Array, "*stack in out"]:
        """`inputs w outputs`, in float32."""
        rows = None if self.inputs is None else self.inputs[..., None]
        columns = None if self.outputs is None else self.outputs[..., None, :]
        return _scaled(_scaled(dense(self.w), rows), columns)


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else (x.astype(jnp.float32) * scale).astype(x.dtype)


class _Config(NamedTuple):
    target: str
    feedforward: str | None
    init_ia3_weights: bool


def ia3(
    target: str = _TARGET, feedforward: str | None = None, *, init_ia3_weights: bool = True
) -> Peft:
    """Scales the outputs of the matrices that match `target`, and the inputs of the feed-forward ones.

    `y = l * (x W + bias)`, and for the feed-forward `y = (l * x) W + bias`, with a learned vector `l` a
    matrix. The defaults are PEFT's for Llama: keys, values, and what enters `mlp/down`. A bias is
    scaled with its outputs, as in PEFT.

    Costs one number for each output of a target (of a feed-forward one, each input): with the
    defaults `layers * (2 * kv_heads * head_dim + intermediate_size)`. Each target adds one elementwise
    product to the forward pass, and none once merged.

    Args:
        target: regex over parameter names such as `layers/attention/key/kernel`.
        feedforward: regex of the targets whose inputs are scaled in place of the outputs; by default
            `mlp/down`.
        init_ia3_weights: start at ones, which is the base. Otherwise the vectors are drawn from a
            standard normal, as in PEFT, and the model starts as another one.

    Raises:
        ValueError: a regex that matches nothing; a `feedforward` that matches no target.

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3. Agrees with PEFT 0.21 `IA3Layer`.
    """
    return _method(_Config(target, feedforward, init_ia3_weights))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Config) -> Peft:
    return Peft(
        functools.partial(_init, config), _attach, _merge, functools.partial(_export, config)
    )


def _init(config: _Config, key: PRNGKeyArray, params: Params) -> Params:
    matched = targets(params, config.target)
    pattern = tree.regex(_FEEDFORWARD if config.feedforward is None else config.feedforward)
    inner = {name: w for name, w in matched.items() if pattern.search(name)}
    if config.feedforward is not None and not inner:
        raise ValueError(
            f"feedforward={config.feedforward!r} matches no target; they are {', '.join(matched)}"
        )
    outer = {name: w for name, w in matched.items() if name not in inner}
    found: dict[str, Any] = {}
    for part, axis, matrices in (("inputs", "in", inner), ("outputs", "out", outer)):
        if matrices:
            draw = functools.partial(_scales, config, part)
            found |= tree.flatten(drawn(key, matrices, draw, {part: (axis,)}))
    return tree.unflatten(found)


def _scales(config: _Config, part: str, key: PRNGKeyArray, name: str, w: Any) -> dict[str, Array]:
    shape = (*w.shape[:-2], w.shape[-2 if part == "inputs" else -1])
    if config.init_ia3_weights:
        return {part: jnp.ones(shape, jnp.float32)}
    return {part: jax.random.normal(key, shape, jnp.float32)}


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    """Nothing of it is random: the key has no effect."""
    matrices = replaced(params, adapter, lambda name, w, parts: Ia3(w, **parts))
    return tree.replace(matrices, _biases(params, adapter))


def _merge(params: Params, adapter: Params) -> Params:
    matrices = replaced(params, adapter, lambda name, w, parts: merged(Ia3(w, **parts), w))
    return tree.replace(matrices, _biases(params, adapter))


def _biases(params: Params, adapter: Params) -> dict[str, Array]:
    """The biases beside matrices whose outputs are scaled, scaled too, in their own dtype."""
    named = tree.flatten(params)
    scales = {_bias(name): parts.get("outputs") for name, parts in grouped(adapter).items()}
    return {name: _scaled(named[name], scale) for name, scale in scales.items() if name in named}


def _bias(name: str) -> str:
    return name.removesuffix("kernel") + "bias"


# The format of the PEFT library: `ia3_l` is [out, 1], or [1, in] of a feed-forward matrix.

_READ = {"feedforward_modules", "init_ia3_weights"}


def _export(config: _Config, adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    tensors: dict[str, np.ndarray] = {}
    found: dict[str, set[str]] = {"inputs": set(), "outputs": set()}
    for name, parts in grouped(adapter).items():
        ((part, scale),) = parts.items()
        for index in np.ndindex(*scale.shape[:-1]):
            module = modules[tree.numbered(name, index)]
            side = (1, -1) if part == "inputs" else (-1, 1)
            tensors[f"{module}.ia3_l"] = np.ascontiguousarray(scale[index]).reshape(side)
            found[part].add(module.rpartition(".")[2])
    fields = {
        "peft_type": "IA3",
        "target_modules": sorted(found["inputs"] | found["outputs"]),
        "feedforward_modules": sorted(found["inputs"]),
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_ia3_weights": config.init_ia3_weights,
    }
    return PeftFiles(fields, tensors)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of (IA)³.

    Args:
        files: settings, and tensors by `<module>.ia3_l`.
        modules: PEFT's module for each of our matrices, by full name (`layers/3/mlp/down/kernel`).
        params: the base, for the shapes. A layer of a stack that PEFT left out is scaled by one.

    Raises:
        ValueError: a setting that changes the function and is not supported, a tensor of a module
            that the model does not have, a shape that does not fit; each by name.
    """
    if files.fields.get("peft_type") != "IA3":
        return None
    for field, value in files.fields.items():
        if field not in WITHOUT_EFFECT | _READ and value not in (None, False, [], {}):
            raise ValueError(
                f"the adapter's configuration sets {field}={value!r}, which is not supported"
            )
    tensors = dict(files.tensors)
    adapter: dict[str, Array] = {}
    for name, w in tree.flatten(params).items():
        parts = {
            index: _part(tensors.pop(f"{module}.ia3_l"), module, w.shape[-2:])
            for index in np.ndindex(*w.shape[:-2])
            if (module := modules.get(tree.numbered(name, index), ""))
            and f"{module}.ia3_l" in tensors
        }
        if parts:
            adapter |= _stacked(name, parts, w.shape)
    refuse_unknown(tensors)
    return _method(_config(files.fields, adapter)), tree.unflatten(adapter)


def _config(fields: Mapping[str, Any], adapter: Mapping[str, Array]) -> _Config:
    names = [full.rpartition("/") for full in adapter]
    target = "|".join(name for name, _, _ in names)
    inner = "|".join(name for name, _, part in names if part == "inputs")
    start = bool(fields.get("init_ia3_weights", True))
    return _Config(f"^({target})$", f"^({inner})$" if inner else None, start)


def _part(tensor: np.ndarray, module: str, sides: tuple[int, ...]) -> tuple[str, np.ndarray]:
    """What is scaled, inputs or outputs, and by what."""
    fan_in, fan_out = sides
    if tensor.shape not in ((1, fan_in), (fan_out, 1)):
        raise ValueError(
            f"{module}: ia3_l {tensor.shape} does not fit a matrix of {fan_in} inputs and {fan_out} "
            f"outputs: (1, {fan_in}) or ({fan_out}, 1) would; is the adapter for another model?"
        )
    if not np.isfinite(np.asarray(tensor, np.float32)).all():
        raise ValueError(f"{module}: ia3_l holds NaN or infinite numbers")
    return ("inputs" if tensor.shape == (1, fan_in) else "outputs"), tensor.ravel()


def _stacked(
    name: str, parts: Mapping[tuple[int, ...], tuple[str, np.ndarray]], shape: tuple[int, ...]
) -> dict[str, Array]:
    kinds = {part for part, _ in parts.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"the adapter scales the inputs of {name} in some layers and the outputs in others, "
            "which is not supported"
        )
    (part,) = kinds
    scale = np.ones((*shape[:-2], shape[-2 if part == "inputs" else -1]), np.float32)
    for index, (_, values) in parts.items():
        scale[index] = values
    return {f"{name}/{part}": jnp.asarray(scale)}

"""From a checkpoint's files to (sharded) device arrays, one tensor on the host at a time."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import PRNGKeyArray

from trainjax import axes, parallel, platform, quant, tree
from trainjax.io.hub import open_checkpoint
from trainjax.io.quantised import refuse
from trainjax.models import _adapters
from trainjax.models._model import (
    CORNER,
    SCORE,
    Model,
    abstract_params,
    check_tokenizer,
    family,
    fingerprint,
    tensor_names,
)
from trainjax.nn import Decoder, body, check_heads, remat
from trainjax.types import Checkpoint, Params, Peft

_IGNORED = ("rotary_emb.inv_freq", ".attn.bias", "masked_bias")  # buffers that old files carry


@runtime_checkable
class WithGeneration(Checkpoint, Protocol):
    """A checkpoint that says how the model generates."""

    def generation(self) -> dict[str, Any]:
        """The contents of `generation_config.json`, or what stands for them; empty where there is none."""
        ...


def load(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute_dtype: Any = None,
    remat: Callable[..., Any] | None = remat.full,
    quantise: quant.Format | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """A model from a hub id, a Hugging Face folder or a `.gguf` file.

    Args:
        source: `HuggingFaceTB/SmolLM2-135M-Instruct`, `path/to/folder` or `path/to/file.gguf`.
        mesh: lays the weights out over it by `parallel.DECODER`.
        dtype: what weights are kept in; by default what the file has (float32 for quantised GGUF).
        compute_dtype: what activations are in; by default float32 on CPU and bfloat16 elsewhere.
        remat: what the backward pass keeps; one of `trainjax.nn.remat`.
        quantise: a format of `trainjax.quant` for the layers' matrices, `nf4()` say: one tensor after the
            other is quantised, from the file's numbers, so that the model never is in memory as it was.
            Its fingerprint stays that of the original weights.
        adapter: a folder in PEFT's format, to be attached.

    Raises:
        ValueError: no such model, an unsupported architecture, tensors that are missing, unknown or
            of another shape, a reward model, an adapter that was trained on another base; a tensor that
            cannot be quantised, by name.
    """
    checkpoint = open_checkpoint(source)
    if SCORE in checkpoint.shapes():
        raise ValueError(
            f"{source} is a reward model: it has {SCORE}, to score texts and not to make them; "
            "give the model that it was trained from, or read it with load_scorer"
        )
    model = _from_checkpoint(checkpoint, str(source), mesh, dtype, compute_dtype, remat, quantise)
    if adapter is None:
        return model
    method, factors = _adapters.load_adapter(adapter, model)
    return model.with_params(method.attach(model.params, factors))


def load_scorer(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute_dtype: Any = None,
    remat: Callable[..., Any] | None = remat.full,
    quantise: quant.Format | None = None,
    adapter: str | Path | None = None,
    other_base: bool = False,
) -> tuple[Model, Peft | None, Params]:
    """A reward model: model, method and params, as `scorer(model, method)` takes them.

    Args:
        source: a folder of a sequence classifier of transformers (with `score.weight`), or what `load`
            reads, if there is an adapter.
        mesh: as in `load`.
        dtype: as in `load`; the head that scores is in float32 in any case.
        compute_dtype: as in `load`.
        remat: as in `load`.
        quantise: as in `load`.
        adapter: a folder in PEFT's format, of `task_type` SEQ_CLS: it has the head, and is not attached.
        other_base: accept an adapter that was trained here on another base of the same shape.

    Raises:
        ValueError: as in `load`; a model without a head that scores and no adapter that has one.

    Source: agrees with `AutoModelForSequenceClassification` of transformers 5, and PEFT 0.21 over it.
    """
    checkpoint = open_checkpoint(source)
    model = _from_checkpoint(checkpoint, str(source), mesh, dtype, compute_dtype, remat, quantise)
    if adapter is not None:
        return model, *_adapters.load_scoring_adapter(adapter, model, other_base=other_base)
    if "score" not in model.params:
        raise ValueError(
            f"{source} has no {SCORE}, so it cannot score; give a reward model's folder, or the adapter "
            "of one besides its base"
        )
    head = tree.cast(model.params["score"], jnp.float32)
    return model, None, {"body": body(model.params), "score": head}


def _from_checkpoint(
    checkpoint: Checkpoint,
    source: str,
    mesh: Mesh | None,
    dtype: Any,
    compute_dtype: Any,
    remat: Any,
    quantise: quant.Format | None,
) -> Model:
    refuse(source, checkpoint.config)
    module = _module(checkpoint.config, mesh, compute_dtype, remat)
    tokenizer = checkpoint.tokenizer()
    check_tokenizer(source, module.config, tokenizer)
    params, corners = _read(checkpoint, _abstract(checkpoint, module), mesh, dtype, quantise)
    return Model(
        module.config,
        module,
        params,
        tokenizer,
        checkpoint.config,
        source,
        fingerprint(params, corners),
        checkpoint.generation() if isinstance(checkpoint, WithGeneration) else {},
    )


def _abstract(checkpoint: Checkpoint, module: Decoder) -> Params:
    """The params to read: with a reward model's head in the place of the other."""
    abstract, shapes = abstract_params(module), checkpoint.shapes()
    if SCORE not in shapes:
        return abstract
    labels, hidden = shapes[SCORE]
    if hidden != (width := module.config.hidden_size):
        raise ValueError(f"{SCORE} is {shapes[SCORE]}; the hidden states are {width} wide")
    kernel = jax.ShapeDtypeStruct((width, labels), jnp.float32)
    return body(abstract) | {"score": {"kernel": kernel}}


def random_model(
    hf: Mapping[str, Any],
    key: PRNGKeyArray,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: Callable[..., Any] | None = remat.full,
    tokenizer: Any = None,
) -> Model:
    """A model with random weights from the contents of a `config.json`: tests, training from scratch."""
    module = _module(hf, mesh, compute_dtype, remat)
    abstract = abstract_params(module)
    layout = None if mesh is None else parallel.shardings(abstract, mesh)

    @functools.partial(jax.jit, out_shardings=layout)
    def init(key: PRNGKeyArray) -> Params:
        tokens = jnp.zeros((1, 8), jnp.int32)
        return tree.cast(module.init(key, tokens, tokens)["params"], dtype)

    params = init(key)
    return Model(module.config, module, params, tokenizer, dict(hf), "random", fingerprint(params))


def _module(hf: Mapping[str, Any], mesh: Mesh | None, compute_dtype: Any, remat: Any) -> Decoder:
    if compute_dtype is None:
        compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config = family(hf).config(hf)
    check_heads(config, axes.length(mesh, "tensor"))
    return Decoder(config, jnp.dtype(compute_dtype), remat, mesh)


def _read(
    checkpoint: Checkpoint,
    abstract: Params,
    mesh: Mesh | None,
    dtype: Any,
    quantise: quant.Format | None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """The params, and of those that were quantised the first numbers, for the fingerprint."""
    names = tensor_names(checkpoint.config, abstract)
    _check_names(checkpoint, names, tied="head/kernel" not in names)
    corners: dict[str, np.ndarray] = {}

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> Any:
        tensors, layout = names[name], _layout(name, shape.shape, mesh)
        transposed = name.endswith("kernel")
        stacked = len(tensors) == shape.shape[0] and name.startswith("layers/")
        each = shape.shape[1:] if stacked else shape.shape
        _check_shapes(checkpoint, tensors, each[::-1] if transposed else each)
        if quantise is not None and re.search(quant.LAYERS, name):
            corners[name] = _corner(checkpoint, tensors)
            return _stack(
                quantise.encode, _read_for(quantise, checkpoint, tensors), tensors, layout
            )

        def values() -> Iterator[np.ndarray]:
            for tensor in tensors:
                value = checkpoint.read(tensor)
                value = value.T if transposed else value
                yield np.ascontiguousarray(value if dtype is None else value.astype(dtype))

        if not stacked:
            return platform.put(next(values()), layout)
        return _stack(_as_it_is, values(), tensors, layout)

    return tree.map_named(leaf, abstract), corners


def _check_shapes(
    checkpoint: Checkpoint, tensors: Sequence[str], expected: tuple[int, ...]
) -> None:
    for tensor in tensors:
        if (found := checkpoint.shapes()[tensor]) != expected:
            raise ValueError(f"{tensor} is {found}; config.json asks for {expected}")


def _corner(checkpoint: Checkpoint, tensors: Sequence[str]) -> np.ndarray:
    first = [checkpoint.read(tensor)[:CORNER, :CORNER].T for tensor in tensors[:CORNER]]
    return np.stack(first)


Encode = Callable[[Any], Any]


def _as_it_is(value: Any) -> Any:
    return value


def _read_for(
    quantise: quant.Format, checkpoint: Checkpoint, tensors: Sequence[str]
) -> Iterator[Any]:
    """The tensors as the format takes them.

    Raises:
        ValueError: one cannot be quantised, or is stored in another way than the first; by name.
    """
    kinds = set()
    for tensor in tensors:
        value = quantise.read(checkpoint, tensor)
        kinds.add(jax.tree.structure(value))
        if len(kinds) > 1:
            raise ValueError(
                f"{tensor} is stored in another format than {tensors[0]}; layers are stacked, so all of a "
                "kind have to be in one to stay as stored"
            )
        yield value


def _stack(encode: Encode, values: Iterator[Any], tensors: Sequence[str], layout: Sharding) -> Any:
    """What `encode` makes of the tensors as one stack; each is on the host only until it is copied."""
    first = next(values)
    shapes = _stacked_shapes(encode, first, tensors)
    layouts = quant.layout(shapes, layout) if tree.is_weight(shapes) else layout
    leaves, structure = jax.tree.flatten(layouts)
    fill = _filler(encode, tuple(leaves), structure)
    stack = jax.tree.unflatten(structure, _zeros(tuple(jax.tree.leaves(shapes)), tuple(leaves))())
    for index, value in enumerate(itertools.chain([first], values)):
        stack = fill(stack, value, index)
    return stack


def _stacked_shapes(encode: Encode, value: Any, tensors: Sequence[str]) -> Any:
    try:
        one = jax.eval_shape(encode, value)
    except ValueError as error:
        raise ValueError(f"{tensors[0]} cannot be quantised: {error}") from error
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(tensors), *x.shape), x.dtype), one)


# Programs are kept: the matrices of a model have few shapes, and a process may load several models.
@functools.cache
def _zeros(
    shapes: tuple[jax.ShapeDtypeStruct, ...], layouts: tuple[Sharding, ...]
) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)

    return jax.jit(make, out_shardings=layouts)


@functools.cache
def _filler(encode: Encode, layouts: tuple[Sharding, ...], structure: Any) -> Callable[..., Any]:
    def fill(stack, tensor, index):
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, index, 0)  # noqa: E731
        return jax.tree.map(put, stack, encode(tensor))

    layout = jax.tree.unflatten(structure, layouts)
    return jax.jit(fill, donate_argnums=0, out_shardings=layout)


def _layout(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, parallel.spec(name, shape, mesh))


def _check_names(checkpoint: Checkpoint, names: Mapping[str, list[str]], tied: bool) -> None:
    wanted = {tensor for group in names.values() for tensor in group}
    found = checkpoint.shapes().keys()
    if missing := sorted(wanted - found):
        raise ValueError(
            f"the checkpoint has no {missing[0]!r} ({len(missing)} tensors are missing)"
        )
    ignored = (*_IGNORED, *(["lm_head.weight"] if tied else []))
    unknown = [t for t in sorted(found - wanted) if not t.endswith(ignored)]
    if unknown:
        raise ValueError(
            f"the checkpoint holds {unknown[0]!r}, which model_type="
            f"{checkpoint.config['model_type']!r} does not have here ({len(unknown)} such tensors)"
        )

"""From a checkpoint's files to (sharded) device arrays, one tensor on the host at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import PRNGKeyArray

from trainjax import parallel, tree
from trainjax.io.hub import open_checkpoint
from trainjax.models import _adapters
from trainjax.models._model import (
    SCORE,
    Model,
    abstract_params,
    family,
    fingerprint,
    tensor_names,
)
from trainjax.nn import Decoder, body, remat
from trainjax.types import Checkpoint, Params, Peft

_IGNORED = ("rotary_emb.inv_freq", ".attn.bias", "masked_bias")  # buffers that old files carry


def load(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    compute_dtype: Any = None,
    remat: Callable[..., Any] | None = remat.full,
    adapter: str | Path | None = None,
) -> Model:
    """A model from a hub id, a Hugging Face folder or a `.gguf` file.

    Args:
        source: `HuggingFaceTB/SmolLM2-135M-Instruct`, `path/to/folder` or `path/to/file.gguf`.
        mesh: lays the weights out over it by `parallel.DECODER`.
        dtype: what weights are kept in; by default what the file has (float32 for quantised GGUF).
        compute_dtype: what activations are in; by default float32 on CPU and bfloat16 elsewhere.
        remat: what the backward pass keeps; one of `trainjax.nn.remat`.
        adapter: a folder in PEFT's format, to be attached.

    Raises:
        ValueError: no such model, an unsupported architecture, tensors that are missing, unknown or
            of another shape, a reward model, an adapter that was trained on another base.
    """
    checkpoint = open_checkpoint(source)
    if SCORE in checkpoint.shapes():
        raise ValueError(
            f"{source} is a reward model: it has {SCORE}, to score texts and not to make them; "
            "give the model that it was trained from, or read it with load_scorer"
        )
    model = _from_checkpoint(checkpoint, str(source), mesh, dtype, compute_dtype, remat)
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
        adapter: a folder in PEFT's format, of `task_type` SEQ_CLS: it has the head, and is not attached.
        other_base: accept an adapter that was trained here on another base of the same shape.

    Raises:
        ValueError: as in `load`; a model without a head that scores and no adapter that has one.

    Source: agrees with `AutoModelForSequenceClassification` of transformers 5, and PEFT 0.21 over it.
    """
    checkpoint = open_checkpoint(source)
    model = _from_checkpoint(checkpoint, str(source), mesh, dtype, compute_dtype, remat)
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
) -> Model:
    module = _module(checkpoint.config, mesh, compute_dtype, remat)
    params = _read(checkpoint, _abstract(checkpoint, module), mesh, dtype)
    return Model(
        module.config,
        module,
        params,
        checkpoint.tokenizer(),
        checkpoint.config,
        source,
        fingerprint(params),
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
    return Decoder(family(hf).config(hf), jnp.dtype(compute_dtype), remat, mesh)


def _read(checkpoint: Checkpoint, abstract: Params, mesh: Mesh | None, dtype: Any) -> Params:
    names = tensor_names(checkpoint.config, abstract)
    _check_names(checkpoint, names, tied="head/kernel" not in names)

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        transposed = name.endswith("kernel")
        stacked = len(names[name]) == shape.shape[0] and name.startswith("layers/")
        each = shape.shape[1:] if stacked else shape.shape
        expected = each[::-1] if transposed else each
        for tensor in names[name]:
            if (found := checkpoint.shapes()[tensor]) != expected:
                raise ValueError(f"{tensor} is {found}; config.json asks for {expected}")

        def tensors():
            for tensor in names[name]:
                value = checkpoint.read(tensor)
                value = value.T if transposed else value
                yield np.ascontiguousarray(value if dtype is None else value.astype(dtype))

        return _stack(tensors(), shape.shape, _layout(name, shape.shape, mesh), stacked)

    return tree.map_named(leaf, abstract)


def _stack(tensors: Any, shape: tuple[int, ...], layout: Sharding, stacked: bool) -> jax.Array:
    """The tensors as one device array; each is on the host only until it has been copied."""
    if not stacked:
        return jax.device_put(next(tensors), layout)
    first = next(tensors)
    stack = jax.jit(lambda: jnp.zeros(shape, first.dtype), out_shardings=layout)()
    fill = _filler(layout)
    stack = fill(stack, first, 0)
    for index, tensor in enumerate(tensors, 1):
        stack = fill(stack, tensor, index)
    return stack


@functools.cache
def _filler(layout: Sharding) -> Callable[..., jax.Array]:
    def fill(stack, tensor, index):
        return jax.lax.dynamic_update_index_in_dim(stack, tensor, index, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=layout)


def _layout(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
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

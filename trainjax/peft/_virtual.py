"""What methods that add virtual tokens have in common: their place in the params, and PEFT's files."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax import tree
from trainjax.types import Params, PeftFiles

_PLACES = ("prompt", "prefix")  # that the decoder looks at; see `nn.virtual`
_TENSOR = "prompt_embeddings"


def checked_count(num_virtual_tokens: int) -> int:
    """The number of virtual tokens.

    Raises:
        ValueError: there is none.
    """
    if operator.index(num_virtual_tokens) < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens}: there is at least one")
    return num_virtual_tokens


def checked_size(encoder_hidden_size: int | None) -> int | None:
    """The width of an encoder's hidden layer, or None for that of the tokens.

    Raises:
        ValueError: it is below 1.
    """
    if encoder_hidden_size is not None and operator.index(encoder_hidden_size) < 1:
        raise ValueError(
            f"encoder_hidden_size={encoder_hidden_size}: a layer has at least one unit"
        )
    return encoder_hidden_size


def attached(params: Params, place: str, leaves: Mapping[str, Array]) -> Params:
    """The params with virtual tokens.

    Raises:
        ValueError: they have some already.
    """
    if taken := [name for name in _PLACES if name in params]:
        raise ValueError(f"the params have virtual tokens already, a {taken[0]}; attach one method")
    return {**params, place: dict(leaves)}


def merge(params: Params, adapter: Params) -> NoReturn:
    """Refuses.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "virtual tokens do not merge: they are keys and values that every token sees, and no weights "
        "have that function; attach the adapter instead, or save it with save_adapter"
    )


def linear(
    key: PRNGKeyArray, fan_in: int, fan_out: int, stack: tuple[int, ...] = ()
) -> dict[str, Float[Array, "..."]]:
    """Kernel and bias uniform in `±1/sqrt(in)`, as `torch.nn.Linear` begins."""
    first, second = jax.random.split(key)
    bound = fan_in**-0.5
    kernel = jax.random.uniform(first, (*stack, fan_in, fan_out), jnp.float32, -bound, bound)
    bias = jax.random.uniform(second, (*stack, fan_out), jnp.float32, -bound, bound)
    return {"kernel": kernel, "bias": bias}


def applied(layer: Params, x: Float[Array, "virtual in"]) -> Float[Array, "*stack virtual out"]:
    """`x @ kernel + bias`, for each of a stack of layers."""
    return x @ layer["kernel"] + layer["bias"][..., None, :]


def table(params: Params) -> Array:
    """The embeddings of the vocabulary.

    Raises:
        ValueError: the model has none.
    """
    return _leaf(params, "embed/embedding")


def projections(params: Params) -> dict[str, Any]:
    """The matrices that make keys and values, which prefixes stand beside.

    Raises:
        ValueError: the model has none.
    """
    return {name: _leaf(params, f"layers/attention/{name}/kernel") for name in ("key", "value")}


def _leaf(params: Params, name: str) -> Any:
    named = tree.flatten(params)
    if name not in named:
        raise ValueError(f"virtual tokens need {name!r}; the model has {', '.join(named)}")
    return named[name]


# The format of the PEFT library, which keeps the tokens and not what made them.

_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "num_attention_heads", "num_virtual_tokens", "token_dim"),
    *("num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "init_weights", "prefix_projection", "encoder_hidden_size"),
    *("encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"),
}
"""Fields that tell sizes, which the tensor tells too, or how the tokens began and were made."""


def export(
    kind: str, tokens: Float[Array, "virtual width"], fields: Mapping[str, Any]
) -> PeftFiles:
    """The files of a `PROMPT_TUNING`, `P_TUNING` or `PREFIX_TUNING` adapter."""
    common = {
        "peft_type": kind,
        "inference_mode": True,
        "num_virtual_tokens": tokens.shape[0],
        "num_transformer_submodules": 1,
    }
    return PeftFiles(common | dict(fields), {_TENSOR: np.ascontiguousarray(tokens)})


def read(files: PeftFiles, width: int) -> Float[Array, "virtual width"]:
    """The tokens in PEFT's files.

    Args:
        files: of one of the three kinds.
        width: numbers that a token of this model has.

    Raises:
        ValueError: a field that is not supported, by name; a tensor that is missing, is not of this
            model, or holds numbers that are not finite.
    """
    for key, value in files.fields.items():
        if key in _WITHOUT_EFFECT or value in (None, False, [], {}):
            continue
        if key == "num_transformer_submodules" and value == 1:
            continue
        raise ValueError(
            f"the adapter's configuration sets {key}={value!r}, which is not supported"
        )
    if unknown := sorted(files.tensors.keys() - {_TENSOR}):
        raise ValueError(f"the adapter holds {unknown[0]!r}, which fits no module of the model")
    if _TENSOR not in files.tensors:
        raise ValueError(f"the adapter has no tensor {_TENSOR!r}")
    tokens = files.tensors[_TENSOR]
    expected = (files.fields.get("num_virtual_tokens"), width)
    if tokens.shape != expected:
        raise ValueError(
            f"the adapter's {_TENSOR} has the shape {tokens.shape}, and this model's has {expected}: "
            "num_virtual_tokens and the numbers of one; is the adapter for another model?"
        )
    if not np.isfinite(np.asarray(tokens, np.float32)).all():
        raise ValueError(f"the adapter's {_TENSOR} holds NaN or infinite numbers")
    return jnp.asarray(tokens, jnp.float32)

"""A model folder that transformers loads: config, safetensors, tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainjax import tree
from trainjax.io import folder
from trainjax.io import tokenizer as tokenizers
from trainjax.models._model import Model, config_json, tensor_names
from trainjax.types import Params


def save_model(path: str | Path, model: Model, params: Params | None = None) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `load` read.

    The base's `generation_config.json` goes along: end tokens that it alone names, sampling settings.
    Params with a `score` in the place of the head make a sequence classifier's; see `save_scorer`.
    The folder appears whole or not at all: it is written under another name and moved into place.

    Args:
        path: the folder; it may exist if it is empty.
        model: for the architecture, the tensors' names and the tokenizer.
        params: plain arrays, `lora.merge(model.params, adapter)` say; by default the model's own.

    Raises:
        ValueError: params that are not plain arrays, or that transformers' model does not have (virtual
            tokens); a folder that holds something.
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    params = model.params if params is None else params
    for name, leaf in tree.flatten(params).items():
        if tree.is_weight(leaf):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}, not an array; merge the adapter first, or make "
                "quantised weights dense with quant.dense"
            )
    with folder.written(Path(path)) as temporary:
        dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype).name
        kept = config_json(model, params).items()
        hf = {k: v for k, v in kept if k not in ("torch_dtype", "quantization_config")}
        tokenizer = model.tokenizer
        if "score" in params:
            tokenizer = _with_padding(tokenizer, hf.get("pad_token_id"))
            hf |= _classifier(hf, params["score"]["kernel"].shape[1], tokenizer)
        elif model.generation:
            folder.write_json(temporary / folder.GENERATION, model.generation)
        folder.write_json(temporary / "config.json", hf | {"dtype": dtype})
        folder.write_shards(temporary, _tensors(model, params))
        if tokenizer is not None:
            tokenizers.save(tokenizer, temporary)


def _classifier(hf: Mapping[str, Any], labels: int, tokenizer: Any) -> dict[str, Any]:
    """What `config.json` says of a model that gives numbers to texts."""
    names = [f"LABEL_{label}" for label in range(labels)]
    family, _, _ = (hf.get("architectures") or [hf["model_type"].capitalize()])[0].partition("For")
    return {
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "num_labels": labels,
        "pad_token_id": hf.get("pad_token_id") if tokenizer is None else tokenizer.pad_token_id,
    }


def _with_padding(tokenizer: Any, named: int | None) -> Any:
    """The tokenizer with the padding token that the scorer knows, or else one that ends no text.

    transformers scores the last token that is not padding. Where the config has named a padding token, the
    scorer has passed over it in the same way. Where it has not, the end of a text was scored, and
    another token has to pad; without one none does, and transformers takes no batches.
    """
    if tokenizer is None:
        return None
    if named in range(len(tokenizer)):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
        return tokenizer
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    taken = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    added = tokenizer.added_tokens_decoder.items()
    free = [token.content for number, token in added if token.special and number not in taken]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = free[0] if free else None
    return tokenizer


def _tensors(model: Model, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    leaves = tree.flatten(params)
    for name, tensors in tensor_names(model.hf, params).items():
        stacked = name.startswith("layers/")
        for index, tensor in enumerate(tensors):
            value = host_array(leaves[name][index] if stacked else leaves[name])
            yield tensor, value.T if name.endswith("kernel") else value


def host_array(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this host, gathered from other processes where it is spread over them."""
    return np.asarray(whole(array))


def whole(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The array, on all devices where other processes have parts of it: each can read it then."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    # Processes share only what a mesh spreads.
    assert isinstance(array.sharding, NamedSharding)
    return jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(
        array
    )

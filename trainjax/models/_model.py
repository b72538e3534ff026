"""A loaded model, and the family that knows its names."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import pkgutil
import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trainjax import platform, tree
from trainjax.nn import Decoder, DecoderConfig, head
from trainjax.ops.head import logits
from trainjax.types import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """What `load` returns, made of plain parts each of which can be used alone.

    Attributes:
        config: the architecture.
        module: the Flax module; `module.apply({"params": params}, ...)` is a pure function.
        params: the weights, stacked over layers.
        tokenizer: a `PreTrainedTokenizerFast` with its chat template, or None.
        hf: the contents of `config.json`, for writing the model back.
        source: what was loaded, as the user called it.
        fingerprint: tells which weights these are, whatever their dtype and layout.
        generation: the contents of `generation_config.json`, for writing the model back and for the
            tokens that end an answer.
    """

    config: DecoderConfig
    module: Decoder
    params: Params
    tokenizer: Any
    hf: Mapping[str, Any]
    source: str
    fingerprint: str
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def logits(
        self, tokens: Int[Array | np.ndarray, "batch seq"]
    ) -> Float[Array, "batch seq vocab"]:
        """All the logits in float32, for small checks; training never makes them.

        Raises:
            ValueError: an id that is no row of the embedding.
        """
        check_tokens(self.config, tokens)
        return _logits(self.module, self.params, jnp.asarray(tokens, jnp.int32))

    def with_params(self, params: Params) -> Model:
        """The same model with other weights: an adapter attached, say."""
        return dataclasses.replace(self, params=params)

    def with_fp8(self) -> Model:
        """The same model whose layers multiply 8-bit floats; see `ops.fp8.product`."""
        return dataclasses.replace(self, module=self.module.clone(fp8=True))


@functools.partial(platform.jit, static_argnums=0)
def _logits(module: Decoder, params: Params, tokens: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = module.apply({"params": params}, tokens, positions)
    return logits(hidden, head(module.config, params))


def family(hf: Mapping[str, Any]) -> ModuleType:
    """The module of this package that knows the architecture.

    Raises:
        ValueError: none does; the message lists those there are.
    """
    package = __name__.rpartition(".")[0]
    known = [
        module.name
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
        if not module.name.startswith("_")
    ]
    kind = str(hf.get("model_type", "")).replace("-", "_")
    if kind not in known:
        raise ValueError(
            f"model_type={hf.get('model_type')!r} is not supported; {', '.join(known)} are"
        )
    return importlib.import_module(f"{package}.{kind}")


def check_tokens(config: DecoderConfig, tokens: Any) -> None:
    """Refuses ids that are no rows of the embedding, for which JAX would take the nearest row.

    On the host, before anything is computed; ids that are being traced pass.

    Args:
        config: the architecture.
        tokens: integers, of any shape.

    Raises:
        ValueError: naming the first such id.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    if (wrong := ids[(ids < 0) | (ids >= config.vocab_size)]).size:
        raise ValueError(
            f"token {wrong[0]} is not in the vocabulary: the model's embedding has {config.vocab_size} "
            f"rows, 0 to {config.vocab_size - 1}"
        )


def check_tokenizer(source: str, config: DecoderConfig, tokenizer: Any) -> None:
    """Warns of a tokenizer with tokens that the embedding has no rows for.

    Texts without them are as good as any: a padding token that was added to the tokenizer alone is common.
    """
    if tokenizer is None or len(tokenizer) <= config.vocab_size:
        return
    token = tokenizer.convert_ids_to_tokens(config.vocab_size)
    logging.getLogger(__name__).warning(
        "the tokenizer of %s has %d tokens and the embedding %d rows: texts with %r or a later token cannot "
        "be read by the model, and are refused",
        *(source, len(tokenizer), config.vocab_size, token),
    )


def config_json(model: Model, params: Params) -> dict[str, Any]:
    """What `config.json` says of the model with these params, which may have a head of their own."""
    hf = dict(model.hf)
    if hf.get("tie_word_embeddings") and "head" in params:
        hf["tie_word_embeddings"] = False
    return hf


SCORE = "score.weight"
"""The head that scores, in the checkpoints of every family."""


def tensor_names(hf: Mapping[str, Any], params: Params) -> dict[str, list[str]]:
    """For each parameter of ours, the tensors of the checkpoint that it is made of, layer by layer.

    Raises:
        ValueError: a parameter that no checkpoint of the family has: virtual tokens, say.
    """
    table = family(hf).TENSORS | {"score/kernel": SCORE}
    named = tree.flatten(params)
    if unknown := [name for name in named if name not in table]:
        raise ValueError(
            f"{unknown[0]} has no place in the checkpoint of a {hf['model_type']} model; save the model "
            "without its adapter, and the adapter by save_adapter"
        )
    return {name: _expand(table[name], leaf.shape) for name, leaf in named.items()}


def _expand(template: str, shape: tuple[int, ...]) -> list[str]:
    return [template.format(i) for i in range(shape[0])] if "{}" in template else [template]


def abstract_params(module: Decoder) -> Params:
    """Shapes and dtypes of the params, without making them."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]


CORNER = 8
"""How many numbers along each axis of an array tell whose it is."""


def fingerprint(params: Params, corners: Mapping[str, np.ndarray] | None = None) -> str:
    """Eight hex digits from the names, the shapes and the first few numbers of every array.

    Numbers are rounded to bfloat16 first, so a model is the same one in float32 and in bfloat16.

    Args:
        params: arrays, or what stands for them.
        corners: these numbers, `[:8, ..., :8]`, of arrays that were quantised while loading: a model keeps
            its fingerprint in any format.
    """
    corners = dict(corners or {})
    for name, leaf in tree.flatten(params).items():
        if name not in corners:
            corner = tuple(slice(min(size, CORNER)) for size in leaf.shape)
            corners[name] = _where_it_is(leaf)[corner]
    text = "".join(f"{name}{leaf.shape}" for name, leaf in tree.flatten(params).items())
    checksum = 0
    for corner in jax.device_get(jax.tree.leaves(corners)):
        checksum = zlib.crc32(np.ascontiguousarray(corner.astype(jnp.bfloat16)).tobytes(), checksum)
    return f"{zlib.crc32(text.encode(), checksum):08x}"


def _where_it_is(leaf: Any) -> Any:
    """The host's view of an array in its memory, which is cut without a program; another leaf itself."""
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) > 1:
        return leaf
    return np.asarray(leaf) if next(iter(leaf.devices())).platform == "cpu" else leaf

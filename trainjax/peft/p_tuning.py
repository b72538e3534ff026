"""P-tuning: a prompt whose embeddings a small network makes, which trains with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from trainjax.peft import _virtual as virtual
from trainjax.peft._matrices import drawn
from trainjax.types import Params, Peft, PeftFiles


@dataclasses.dataclass(frozen=True)
class _PTuning:
    """The settings; see `p_tuning`."""

    num_virtual_tokens: int
    encoder_hidden_size: int | None = None


def p_tuning(num_virtual_tokens: int = 20, *, encoder_hidden_size: int | None = None) -> Peft:
    """`peft.prompt` with the embeddings `W3 relu(W2 relu(W1 e + b1) + b2) + b3`.

    `e` begins normal, and each layer uniform in `±1/sqrt(in)`. Files hold the embeddings that come out,
    as PEFT's do, and are read back as those of a plain prompt.

    Args:
        num_virtual_tokens: how many embeddings.
        encoder_hidden_size: width of both hidden layers; by default that of the embeddings.

    Raises:
        ValueError: no virtual tokens; a hidden layer without units; params that have virtual tokens
            already.

    Source: Liu et al. 2021, arXiv:2103.10385, with the network of PEFT 0.21 `PromptEncoder` (MLP).
    """
    count = virtual.checked_count(num_virtual_tokens)
    return _method(_PTuning(count, virtual.checked_size(encoder_hidden_size)))


@functools.cache
def _method(config: _PTuning) -> Peft:
    return Peft(functools.partial(_init, config), _attach, virtual.merge, _export)


_LAYERS = ("first", "second", "third")


def _init(config: _PTuning, key: PRNGKeyArray, params: Params) -> Params:
    table = virtual.table(params)
    embed = table.shape[1]
    hidden = config.encoder_hidden_size or embed
    sizes = [(embed, hidden), (hidden, hidden), (hidden, embed)]

    def draw(key: PRNGKeyArray, name: str, table: Array) -> dict[str, Array]:
        keys = jax.random.split(key, 4)
        found = {"embedding": jax.random.normal(keys[0], (config.num_virtual_tokens, embed))}
        for layer, own, (fan_in, fan_out) in zip(_LAYERS, keys[1:], sizes, strict=True):
            for part, value in virtual.linear(own, fan_in, fan_out).items():
                found[f"{layer}/{part}"] = value
        return found

    axes: dict[str, tuple[None, ...]] = {"embedding": (None, None)}
    for layer in _LAYERS:
        axes |= {f"{layer}/kernel": (None, None), f"{layer}/bias": (None,)}
    return drawn(key, {"prompt": table}, draw, axes)


def _tokens(adapter: Params) -> Float[Array, "virtual embed"]:
    parts = adapter["prompt"]
    x = parts["embedding"]
    for layer in _LAYERS[:-1]:
        x = jnp.maximum(virtual.applied(parts[layer], x), 0.0)
    return virtual.applied(parts[_LAYERS[-1]], x)


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    return virtual.attached(params, "prompt", {"embedding": _tokens(adapter)})


def _export(adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    tokens = _tokens(adapter)
    hidden = adapter["prompt"][_LAYERS[0]]["bias"].shape[0]
    fields = {
        "token_dim": tokens.shape[1],
        "encoder_hidden_size": hidden,
        "encoder_reparameterization_type": "MLP",
    }
    return virtual.export("P_TUNING", tokens, fields)


def from_peft(files: PeftFiles, modules: Mapping[str, str], params: Params) -> None:
    """None: files of P-tuning hold a plain prompt, which `prompt.from_peft` reads."""

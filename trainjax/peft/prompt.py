"""Prompt tuning: embeddings of virtual tokens before every text are all that trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from trainjax.peft import _virtual as virtual
from trainjax.peft._matrices import drawn
from trainjax.types import Params, Peft, PeftFiles


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """The settings; see `prompt`."""

    num_virtual_tokens: int
    init_tokens: tuple[int, ...] | None = None


def prompt(num_virtual_tokens: int = 20, *, init_tokens: Sequence[int] | None = None) -> Peft:
    """Each example `t_1 .. t_n` is read as `p_1 .. p_v, t_1 .. t_n` with trained embeddings `p`.

    The prompt goes through the model once for a whole batch, and its keys and values serve all rows
    and all examples packed in them. It begins as embeddings of the vocabulary, so a model with it does
    not begin as the base, and no weights have its function: `merge` refuses.

    Args:
        num_virtual_tokens: how many embeddings.
        init_tokens: ids of the text that it begins as, repeated or cut to the number; by default
            tokens drawn from the vocabulary, which the paper finds better than random numbers.

    Raises:
        ValueError: no virtual tokens; init_tokens that are none, or ids that the vocabulary does not have;
            params that have virtual tokens already.

    Source: Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2. Agrees with PEFT 0.21
    `PromptEmbedding`.
    """
    virtual.checked_count(num_virtual_tokens)
    if init_tokens is not None and not len(init_tokens):
        raise ValueError("init_tokens is an empty text; give ids, or None for a draw")
    tokens = None if init_tokens is None else tuple(map(int, init_tokens))
    return _method(_Prompt(num_virtual_tokens, tokens))


@functools.cache  # equal settings give the same functions, so that jit sees no new program in them
def _method(config: _Prompt) -> Peft:
    return Peft(functools.partial(_init, config), _attach, virtual.merge, _export)


def _init(config: _Prompt, key: PRNGKeyArray, params: Params) -> Params:
    table = virtual.table(params)
    _check_ids(config.init_tokens, table.shape[0])

    def draw(key: PRNGKeyArray, name: str, table: Array) -> dict[str, Array]:
        ids = jax.random.randint(key, (config.num_virtual_tokens,), 0, table.shape[0])
        if config.init_tokens is not None:
            ids = jnp.asarray(np.resize(config.init_tokens, config.num_virtual_tokens))
        return {"embedding": table[ids].astype(jnp.float32)}

    return drawn(key, {"prompt": table}, draw, {"embedding": (None, "out")})


def _check_ids(ids: Sequence[int] | None, vocab: int) -> None:
    if unknown := [token for token in ids or () if not 0 <= token < vocab]:
        raise ValueError(f"init_tokens has the id {unknown[0]}, and the vocabulary {vocab} tokens")


def _attach(params: Params, adapter: Params, key: PRNGKeyArray | None = None) -> Params:
    return virtual.attached(params, "prompt", adapter["prompt"])


def _export(adapter: Params, modules: Mapping[str, str]) -> PeftFiles:
    tokens = adapter["prompt"]["embedding"]
    # How it began is not written as TEXT: PEFT would read the tokenizer of that text again.
    fields = {"token_dim": tokens.shape[1], "prompt_tuning_init": "RANDOM"}
    return virtual.export("PROMPT_TUNING", tokens, fields)


def from_peft(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in PEFT's files, or None if they are not of a prompt.

    Of `P_TUNING` too, whose files hold the prompt that its encoder made, and not the encoder.

    Args:
        files: settings, and the tensor `prompt_embeddings`.
        modules: not read.
        params: the base, for the shapes.

    Raises:
        ValueError: a setting that is not supported, a tensor that does not fit; each by name.
    """
    if files.fields.get("peft_type") not in ("PROMPT_TUNING", "P_TUNING"):
        return None
    tokens = virtual.read(files, virtual.table(params).shape[1])
    return prompt(len(tokens)), {"prompt": {"embedding": tokens}}

"""A tokenizer as the metadata of a GGUF file; the inverse of `io.tokenizer.from_gguf`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, models, pre_tokenizers

from trainjax.io.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    ROLES,
    SPLITTINGS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    PreTrainedTokenizerFast = Any


def to_gguf(tokenizer: PreTrainedTokenizerFast, rows: int) -> dict[str, Any]:
    """The metadata that describes a tokenizer to llama.cpp and to `from_gguf`.

    Special tokens become control tokens, other added ones user-defined. llama.cpp knows the ways to cut
    text into words by name: the name is found from what the tokenizer does, never guessed.

    Args:
        tokenizer: byte-level BPE (GPT-2, SmolLM, Llama 3, Qwen2), or SentencePiece's BPE as in Llama 2.
        rows: of the embedding. Rows without a token get one that is never used, because llama.cpp
            wants as many tokens as rows.

    Raises:
        ValueError: a tokenizer whose ids llama.cpp would not give; the message says what it does.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_model(state["model"])
    tokens, kinds = _tokens(tokenizer, rows)
    prefix = _space_prefix(state)
    own = _byte_level(state) if prefix is None else _sentencepiece(state, tokens, kinds, prefix)
    fields = {
        **{f"tokenizer.ggml.{key}": value for key, value in own.items()},
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        **_around(tokenizer),
    }
    for role, key in ROLES.items():
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            fields[key] = number
    if template := _template(tokenizer.chat_template):
        fields["tokenizer.chat_template"] = template
    return fields


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer's model is {model['type']}, which cannot be written; BPE can"
        )
    if not model["merges"]:
        raise ValueError("the tokenizer has no merges, and llama.cpp loads no BPE without any")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(
                f"the tokenizer sets {key}={model[key]!r}, which a GGUF file cannot say"
            )


def _tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[list[str], list[int]]:
    """The tokens by id, one for each row of the embedding, and what each is."""
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        if number >= rows:
            raise ValueError(
                f"the token {token!r} has the id {number}, beyond the {rows} rows of the embedding"
            )
        tokens[number], kinds[number] = token, NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        if added.lstrip or added.rstrip or added.single_word:
            raise ValueError(
                f"the token {added.content!r} is matched with conditions on the text around it (lstrip, "
                "rstrip, single_word), which a GGUF file cannot say"
            )
        kinds[number] = CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _around(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Whether the begin and the end of a sequence are added to a text."""
    bare, ids = (tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
    start = next((at for at in range(len(ids)) if ids[at : at + len(bare)] == bare), 0)
    found = ids[:start], ids[start + len(bare) :]
    named = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if any(added not in ([], own) for added, own in zip(found, named, strict=True)):
        raise ValueError(
            f"the tokenizer adds the tokens {found[0]} before a text and {found[1]} after it; a GGUF file "
            "can only say that it adds the begin and the end of the sequence"
        )
    keys = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    return dict(zip(keys, map(bool, found), strict=True))


def _template(template: Any) -> str | None:
    """The chat template; of several the default."""
    return template.get("default") if isinstance(template, dict) else template


# --- byte-level BPE -----------------------------------------------------------------------------


def _byte_level(state: Mapping[str, Any]) -> dict[str, Any]:
    asked = _described(state)
    for name, splitting in SPLITTINGS.items():
        known = Tokenizer(models.BPE(ignore_merges=splitting.ignore_merges))
        known.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.pre))
        if splitting.normalizer is not None:
            known.normalizer = splitting.normalizer
        if _described(json.loads(known.to_str())) == asked:
            return {"model": "gpt2", "pre": name}
    normalizer, steps, ignore_merges = asked
    raise ValueError(
        "the tokenizer prepares text in a way that no name of llama.cpp's known here stands for "
        f"({', '.join(SPLITTINGS)}): normalizer {normalizer}, pre_tokenizer {steps}, "
        f"ignore_merges={ignore_merges}"
    )


def _described(state: Mapping[str, Any]) -> tuple[list[Any], list[Any], bool]:
    """What decides how a text is cut into words, without what does not change it."""
    steps = [
        # Offsets into the text are not ids.
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in _flat(state["pre_tokenizer"], "pretokenizers")
    ]
    ignore_merges = bool(state["model"].get("ignore_merges"))
    return list(_flat(state["normalizer"], "normalizers")), steps, ignore_merges


def _flat(step: Mapping[str, Any] | None, parts: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence of sequences, one after another."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step[parts]:
        yield from _flat(part, parts)


# --- SentencePiece ------------------------------------------------------------------------------

_PREPEND = {"type": "Prepend", "prepend": "▁"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _space_prefix(state: Mapping[str, Any]) -> bool | None:
    """Whether a space goes before a text, as SentencePiece does it; None for byte-level BPE."""
    if state["pre_tokenizer"] is not None:
        return None
    steps = list(_flat(state["normalizer"], "normalizers"))
    return {1: False, 2: True}[len(steps)] if steps in ([_PREPEND, _REPLACE], [_REPLACE]) else None


def _sentencepiece(
    state: Mapping[str, Any], tokens: Sequence[str], kinds: list[int], prefix: bool
) -> dict[str, Any]:
    """The fields of SentencePiece's BPE; bytes and the unknown token get their kinds.

    llama.cpp joins the two neighbours whose join has the highest score, where a tokenizer.json has a
    list of merges: a token's score is how early in the list it is first made, negated.
    """
    merges = state["model"]["merges"]
    ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
    for number, token in enumerate(tokens):
        if state["model"]["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[number] = BYTE
        elif token == state["model"]["unk_token"]:
            kinds[number] = UNKNOWN
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": prefix,
        "scores": [-float(ranks.get(token, len(merges))) for token in tokens],
    }

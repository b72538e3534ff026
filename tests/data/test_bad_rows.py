"""Rows that cannot be read: which, why, and what is left of a source without them."""

import json

import pytest

from tests import toy
from trainjax import data
from trainjax.data.bad_rows import as_group, as_text, sound
from trainjax.data.files import Unreadable, kept
from trainjax.recipes import _rows

GOOD = {"prompt": "a", "completion": "b"}
BAD = {
    '{"question": "a"}': "row 0: the columns are question; accepted are",
    '{"prompt": "a", "compl': "line 2: not valid JSON",
    json.dumps(GOOD): None,
    '{"prompt": "a"}': "row 3: the column 'completion' is missing",
    "[1]": "line 5: a row is an object, this is a list",
    '{"prompt": [{"role": "robot", "content": "a"}], "completion": [{"role": "assistant", '
    '"content": "b"}]}': "row 5: the chat template refuses the conversation: unknown role robot",
    json.dumps(GOOD | {"prompt": "c"}): None,
}


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "mixed.jsonl").write_text("\n".join(BAD) + "\n")
    return tmp_path / "mixed.jsonl"


def test_each_bad_row_has_its_number_and_reason_and_the_others_stay(mixed):
    rows, bad = sound(data.read(mixed, kept), as_text(toy.tokenizer()))
    assert list(rows.numbers) == [2, 6]
    assert [rows[i]["prompt"] for i in range(len(rows))] == ["a", "c"]
    expected = [(i, reason) for i, reason in enumerate(BAD.values()) if reason]
    assert [row.number for row in bad] == [number for number, _ in expected]
    for row, (_, reason) in zip(bad, expected, strict=True):
        assert reason in row.reason


def test_a_group_is_read_without_its_neighbours():
    """A labelled completion is compared with the next row's, which may be the bad one."""
    rows = [GOOD | {"label": True}, {"prompt": "a", "label": True}, GOOD | {"label": "maybe"}]
    kept_rows, bad = sound(rows, as_group(data.labelled, toy.tokenizer()))
    assert list(kept_rows.numbers) == [0]
    assert [row.number for row in bad] == [1, 2]


def test_a_source_of_bad_rows_alone_says_why_of_the_first():
    line = Unreadable("x", ValueError("a.jsonl, line 1: not valid JSON"))
    with pytest.raises(ValueError, match=r"none of the 1 rows can be read: .*a\.jsonl, line 1"):
        sound([line], as_text(toy.tokenizer()))


@pytest.mark.parametrize(
    ("text", "label"), [("true", 1.0), ("No", 0.0), ("1", 1.0), ("FALSE", 0.0), (1, 1.0)]
)
def test_labels_may_be_written_as_spreadsheets_have_them(text, label):
    assert data.labelled([GOOD | {"label": text}], 0).values == {"labels": label}


def test_they_are_counted_and_written_to_a_file_that_is_the_same_when_a_run_is_resumed(
    mixed, tmp_path, capsys
):
    file = tmp_path / "dropped.jsonl"
    for name in (str(mixed), "others", str(mixed)):
        rows = data.read(mixed, kept)
        left, numbers = _rows.kept("drop", name, rows, as_text(toy.tokenizer()), file)
        assert (len(left), numbers.tolist()) == (2, [2, 6])
    said = capsys.readouterr().err
    assert f"{mixed}: 5 of 7 rows cannot be read and are left out, into {file}" in said
    dropped = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["data"] for row in dropped] == ["others"] * 5 + [str(mixed)] * 5
    assert [row["row"] for row in dropped[5:]] == [0, 1, 3, 4, 5]
    assert dropped[6]["content"] == '{"prompt": "a", "compl'
    assert dropped[7]["content"] == {"prompt": "a"}


def test_half_a_surrogate_pair_in_rows_is_the_replacement_character():
    broken, whole = (
        data.encode([GOOD | {"completion": f"b {end}"}], toy.tokenizer(), 64)
        for end in ("\ud83d", "\ufffd")
    )
    assert broken.fingerprint() == whole.fingerprint()

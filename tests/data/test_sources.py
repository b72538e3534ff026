import gzip
import json

import pytest
import zstandard

from trainjax.data import read

ROWS = [{"text": "one"}, {"text": "two é"}]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_jsonl(path):
    path = path / "rows.jsonl"
    path.write_text(lines() + "\n")  # an empty line is no row
    return path


def as_gzip(path):
    path = path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines().encode()))
    return path


def as_zstandard(path):
    path = path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(lines().encode()))
    return path


def as_json_array(path):
    path = path / "rows.json"
    path.write_text(" \n" + json.dumps(ROWS))
    return path


def as_csv(path):
    path = path / "rows.csv"
    path.write_text("text\none\ntwo é\n")
    return path


def as_parquet(path):
    import pyarrow
    import pyarrow.parquet

    path = path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.filterwarnings("ignore")  # datasets' own
def as_saved_dataset(path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path / "saved"))
    return path / "saved"


@pytest.mark.filterwarnings("ignore")  # datasets' own, about forks and open files
@pytest.mark.parametrize(
    "write",
    [as_jsonl, as_gzip, as_zstandard, as_json_array, as_csv, as_parquet, as_saved_dataset],
    ids=lambda f: f.__name__,
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, write):
    source = read(write(tmp_path))
    assert [dict(source[i]) for i in range(len(source))] == ROWS


def test_messages_survive_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [row]


@pytest.mark.filterwarnings("ignore")  # tensorflow_datasets' own
def test_tfds_gives_plain_rows_without_tensorflow(tmp_path):
    import sys

    import tensorflow_datasets as tfds

    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ho"}]

    class ToyChats(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            text = tfds.features.Text()
            turns = tfds.features.Sequence({"role": text, "content": text})
            features = tfds.features.FeaturesDict({"messages": turns})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": [(i, {"messages": messages}) for i in range(3)]}

        def _generate_examples(self):
            yield from ()

    ToyChats(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = read(f"tfds:{tmp_path}/toy_chats/1.0.0:train")
    assert len(source) == 3
    assert source[0] == {"messages": messages}
    assert len(read(f"tfds:{tmp_path}/toy_chats/1.0.0:train[1:]")) == 2
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2: a row is an object, this is a list"),
        ("a.json", '[{"text": "a"}, 3]', r"item 1: a row is an object, this is a int"),
        ("a.json", '[{"text": "a"},', r"not valid JSON"),
        ("a.jsonl", "", r"a\.jsonl holds no rows"),
        ("a.txt", "hello", r"cannot tell its format; a file ends in \.jsonl"),
        ("a.parquet", "not parquet", r"not a readable Parquet file"),
        ("a.jsonl.gz", "not gzip", r"cannot be read"),
    ],
)
def test_a_bad_file_is_one_clear_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_said_to_be(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.jsonl'"):
        read("nowhere.jsonl")

"""Files as other programs write them: byte-order marks, wide cells, odd rows, what Arrow fills in."""

import csv
import json

import pytest

from trainjax.data import read

ROWS = [{"prompt": "Fluß?", "completion": "Aare"}, {"prompt": "Lake?", "completion": "Biel"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,completion\nFluß?,Aare\nLake?,Biel\n"


def written(path, name, content, encoding="utf-8"):
    (path / name).write_bytes(content.encode(encoding))
    return path / name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\n\n" + LINES.replace("\n", "\r\n") + "  \n"),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", LINES),
        *(("a.json", json.dumps({name: ROWS})) for name in ("data", "rows", "train")),
        ("a.csv", CSV),
        ("a.csv", CSV.replace("\n", "\r\n") + "\r\n"),
        ("a.csv", CSV.replace(",", ";")),
        ("a.tsv", CSV.replace(",", "\t")),
    ],
    ids=lambda value: ascii(value)[:20],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_way_of_writing_rows_gives_the_same(tmp_path, name, content, encoding):
    assert read(written(tmp_path, name, content, encoding)) == ROWS


def test_a_single_object_is_a_row_and_its_list_no_list_of_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert read(written(tmp_path, "a.json", json.dumps(row, indent=1))) == [row]


def test_a_cell_may_be_of_any_length_and_hold_lines(tmp_path):
    limit, cell = csv.field_size_limit(), "line\r\n" * 30_000
    assert read(written(tmp_path, "a.csv", f'text\n"{cell}"\n')) == [{"text": cell}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            "a,b\n1,2\n1,2,3\n",
            "a.csv, line 3: 3 fields, where the first line names 2 fields",
        ),
        ("a.csv", 'a,b\n"x\ny",2\n1\n', "a.csv, line 4: 1 field, where the first line names 2"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: two columns are called 'a'"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv, line 3: not valid CSV: unexpected end of data"),
        (
            "a.jsonl",
            '{\n "text": "a"\n}\n',
            "a.jsonl, line 1: not valid JSON: .* write each row on one line",
        ),
        ("a.jsonl", "[\n{}\n]\n", "a.jsonl, line 1: not valid JSON: .* name the file .json"),
        ("a.jsonl", '{"a": 1},\n{"a": 1}\n', r"a.jsonl, line 1: .*Extra data \(column 9\)"),
        ("a.json", '{"data": [1]}', "a.json, item 0: a row is an object, this is a int"),
    ],
)
def test_an_odd_row_is_one_sentence_with_file_and_line(tmp_path, name, content, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        read(written(tmp_path, name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes("text".encode("utf-16"))
    with pytest.raises(ValueError, match="cannot be read|not UTF-8 text.*; save it as UTF-8"):
        read(tmp_path / name)


def test_half_a_surrogate_pair_is_the_replacement_character(tmp_path):
    row = {"prompt": "a \\ud83d b", "completion": ["\\uD83D\\uDE00"]}
    path = written(tmp_path, "a.jsonl", json.dumps(row).replace("\\\\", "\\"))
    assert read(path) == [{"prompt": "a \ufffd b", "completion": ["\U0001f600"]}]


CALLS = [
    {
        "messages": [{"role": "assistant", "calls": [{"arguments": {"town": "Bern"}}]}],
        "margin": 1.0,
    },
    {"messages": [{"role": "assistant", "calls": [{"arguments": {"a": 1}}]}], "margin": None},
]


def test_what_parquet_and_datasets_fill_in_is_taken_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == CALLS


class TestNamedDatasets:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A dataset with two configurations, whose names are not those of its folders."""
        folder = tmp_path_factory.mktemp("sets") / "my set"
        card = "---\nconfigs:\n"
        for config in ("main", "hard"):
            (folder / f"{config}.d").mkdir(parents=True)
            rows = [{"text": f"{config} {i}"} for i in range(20)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{config}.d" / "train.jsonl").write_text(text)
            card += f"- config_name: {config}\n  data_files: {config}.d/train.jsonl\n"
        (folder / "README.md").write_text(f"{card}---\n")
        return folder

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path_factory, monkeypatch):
        """Keeps what `datasets` prepares out of the home folder."""
        import datasets

        where = tmp_path_factory.getbasetemp() / "hf-cache"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", where)
        datasets.disable_progress_bars()

    @pytest.mark.filterwarnings("ignore")  # datasets' own
    @pytest.mark.parametrize(
        ("name", "count", "first"),
        [
            ("main", 20, "main 0"),
            ("hard:train", 20, "hard 0"),
            ("hard:train[3:10]", 7, "hard 3"),
            ("main:train[:10%]+train[-5:]", 7, "main 0"),
        ],
    )
    def test_a_configuration_and_a_part_of_a_split(self, folder, name, count, first):
        rows = read(f"hf:{folder}/{name}")
        assert (len(rows), rows[0]) == (count, {"text": first})

    @pytest.mark.filterwarnings("ignore")  # datasets' own
    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("", r"my set: Config name is missing.*'main', 'hard'|my set: .*main.*hard"),
            ("/none", r"my set/none: BuilderConfig 'none' not found"),
            ("/main:test", r"my set/main:test: Unknown split \"test\""),
        ],
    )
    def test_what_there_is_not_is_one_sentence(self, folder, name, sentence):
        with pytest.raises(ValueError, match=sentence) as error:
            read(f"hf:{folder}{name}")
        assert "\n" not in str(error.value)

import json

from trainjax import cli
from trainjax.data import tasks


def test_quickstart_leaves_rows_adapter_picture_and_score(model, tmp_path, capsys):
    out = tmp_path / "quick"
    flags = ["--model", str(model), "--out", str(out), "--examples", "24", "--held-out", "6"]
    assert cli.main(["quickstart", *flags]) == 0
    result = json.loads((out / "result.json").read_text())
    assert {"before", "after"} == result.keys()
    assert result["after"]["by_task"].keys() == tasks.TASKS.keys()
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    questions = [
        {
            json.loads(line)["messages"][1]["content"]
            for line in (out / name).read_text().splitlines()
        }
        for name in ("train.jsonl", "test.jsonl")
    ]
    assert [len(asked) for asked in questions] == [24, 6]
    assert not questions[0] & questions[1]
    assert "exact match" in capsys.readouterr().out


def test_a_second_quickstart_does_not_touch_the_first(model, tmp_path, capsys):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "config.yaml").write_text("a: 1\n")
    assert cli.main(["quickstart", "--model", str(model), "--out", str(tmp_path / "quick")]) == 1
    assert (
        "holds another run; continue it with --resume, or give another --out"
        in capsys.readouterr().err
    )

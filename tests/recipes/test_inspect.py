from trainjax import cli


def test_inspect_marks_targets_counts_packing_and_draws_lengths(model, rows, capsys):
    flags = ["--model", str(model), "--max-length", "64", "--batch-size", "4", "--rows", "2"]
    assert cli.main(["inspect", str(rows), *flags]) == 0
    out = capsys.readouterr().out
    assert "«" in out and "[row " in out  # noqa: PT018
    assert "24 examples" in out
    assert "% of the slots filled" in out
    assert "█" in out


def test_inspect_needs_no_weights(model, rows, tmp_path, capsys):
    import shutil

    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert (
        cli.main(["inspect", str(rows), "--model", str(tmp_path / "m"), "--max-length", "64"]) == 0
    )
    assert "«" in capsys.readouterr().out


def test_inspect_ends_at_a_bad_row_or_tells_of_each(model, tmp_path, capsys):
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n{"prompt": "a"}\n{"text": "b"}\n')
    flags = ["inspect", str(file), "--model", str(model)]
    assert cli.main(flags) == 1
    assert capsys.readouterr().err.startswith(f"error: {file}, line 2: not valid JSON")
    assert cli.main([*flags, "--bad-rows", "drop"]) == 0
    said = capsys.readouterr()
    assert "2 of 4 rows cannot be read and are left out" in said.err
    assert "row 2: the column 'text' is missing" in said.err
    assert "[row 3]" in said.out

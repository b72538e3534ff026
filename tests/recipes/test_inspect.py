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

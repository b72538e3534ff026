"""Names of other libraries for an adapter's matrices, and mistakes that are told at once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import toy
from trainjax import cli, data, models
from trainjax.models._model import abstract_params, family
from trainjax.nn import Decoder
from trainjax.recipes import _common as common
from trainjax.recipes import _rows, sft


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ("all-linear", None),
        ("q_proj,v_proj", "attention/(query|value)"),
        ("down_proj", "mlp/down"),
        ("layers/attention/query", "attention/query"),
    ],
)
def test_targets_may_have_the_names_of_other_libraries(given, same):
    family_ = family(toy.CONFIG)
    params = abstract_params(Decoder(family_.config(toy.CONFIG), jnp.dtype(jnp.float32)))

    def matrices(target):
        method = common.PeftConfig(target=target).method()
        return jax.tree.structure(jax.eval_shape(method.init, jax.random.key(0), params))

    assert matrices(given) == matrices(same)


def test_a_target_that_is_not_there_is_told_before_the_model_is_read(model, rows, tmp_path, capsys):
    flags = ["--model", model, "--data", rows, "--out", tmp_path / "run", "--peft.target", "q_prj"]
    assert cli.main(["sft", *map(str, flags)]) == 1
    said = capsys.readouterr().err
    assert "no parameter's name matches 'q_prj'" in said
    assert "loading" not in said


def test_rows_are_no_longer_than_the_data_can_fill():
    two = data.encode(toy.rows(2), toy.tokenizer(), 4096)
    assert two.lengths.sum() < 64
    assert _rows.row_length(data.best_fit, 4096, [two]) == 64
    nine = data.encode(toy.rows(9), toy.tokenizer(), 4096)
    assert _rows.row_length(data.best_fit, 4096, [two, nine]) == -(-nine.lengths.sum() // 64) * 64
    assert _rows.row_length(data.unpacked, 4096, [two, nine]) == 64
    many = data.encode(toy.rows(400), toy.tokenizer(), 4096)
    assert _rows.row_length(data.best_fit, 4096, [many]) == 4096


def test_rows_beyond_what_the_model_was_made_for_are_counted(model, capsys):
    tiny = models.load(model)
    config = sft.Config(model="m", data="d", out=Path("o"), max_length=4096)
    rows = [{"text": "a" * 600}, {"text": "b"}, {"text": "c" * 513}]
    _rows.encode(config, "rows", rows, tiny)
    said = capsys.readouterr().err
    assert "warning: 2 of the 3 examples are longer than the 512 tokens" in said
    pairs = [{"prompt": "a" * 300, "chosen": "b" * 180, "rejected": "c" * 180}]
    _rows.encode(config, "rows", pairs, tiny, data.pair)
    assert "warning" not in capsys.readouterr().err

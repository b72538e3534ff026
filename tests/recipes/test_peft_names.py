"""`--peft.name`: other methods than LoRA train, go on, answer; settings that a method does not have."""

from __future__ import annotations

import json

import pytest

from tests import toy
from trainjax import cli
from trainjax.recipes import _common as common

RATES = {"prefix": 0.3}
RUNS = {
    "adalora": ["--peft.rank", "2", "--peft.initial-rank", "3", "--peft.orthogonality", "0.1"],
    "prefix": ["--peft.num-virtual-tokens", "4"],
    "partial": ["--peft.target", "^norm|layers/1/mlp"],
    "molora": ["--peft.rank", "2", "--peft.experts", "2", "--peft.balance", "0.5"],
}


@pytest.fixture
def train(model, rows, tmp_path):
    """Runs `trainjax sft` with a method, and returns the exit status."""

    def run(name, *flags):
        settings = {"model": model, "data": rows, "out": tmp_path / name, "steps": 6}
        settings |= {"batch-size": 4, "max-length": 64, "peft.name": name}
        settings["learning-rate"] = RATES.get(name, 1e-2)
        args = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return cli.main(["sft", *args, *flags])

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_method_trains_goes_on_and_answers(train, model, tmp_path, capsys, name):
    run = tmp_path / name
    assert train(name, *RUNS[name], "--save-every", "3") == 0
    records = toy.trace(run)
    assert records[-1]["loss"] < records[0]["loss"]
    own_terms = [record["balance"] for record in records if "balance" in record]
    assert len(own_terms) == (len(records) if name == "molora" else 0)
    assert all(term >= 1.0 - 1e-5 for term in own_terms)  # 1 where experts are in balance
    before = toy.exact(run)
    for newest in (run / "checkpoints").glob("6*"):
        newest.rename(run / "gone")
    assert train(name, *RUNS[name], "--save-every", "3", "--resume") == 0
    assert toy.exact(run) == before
    capsys.readouterr()
    asked = ["--model", model, "--adapter", run, "--prompt", "say ab", "--max-new-tokens", 4]
    assert cli.main(["generate", *map(str, asked)]) == 0
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ia3", ["--peft.rank", "4"], "ia3 has no rank (--peft.rank 4); its settings are target"),
        ("prompt", ["--peft.dropout", "0.1"], "prompt has no dropout (--peft.dropout 0.1)"),
        (
            "full",
            ["--peft.target", "mlp"],
            "full has no target (--peft.target mlp); its settings are none",
        ),
        ("partial", [], "partial needs --peft.target"),
        ("lora", ["--peft.rslora", "--peft.ratio", "4"], "lora has no ratio"),
        ("molora", ["--peft.experts", "1"], "experts=1"),
    ],
)
def test_a_setting_that_the_method_does_not_have_is_named(train, capsys, name, flags, message):
    assert train(name, *flags) != 0
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_every_name_is_a_method_and_the_type_of_the_flag_lists_them():
    assert list(common.PEFT) == list(common.PeftName.__args__)


def test_a_run_is_known_by_all_settings_of_its_method():
    """Not only by those that were given: a new default of a method is another run."""
    config = common.PeftConfig(name="prefix", num_virtual_tokens=4).resolved()
    assert (config.num_virtual_tokens, config.prefix_projection) == (4, False)
    assert common.PeftConfig(name="dora").resolved().rank == 16

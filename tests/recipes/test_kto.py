"""`trainjax kto`: labelled completions in, an adapter out that tells good from bad; what it refuses."""

import pytest

from tests import toy
from trainjax import cli

ROWS = [
    {"prompt": f"say {i}", "completion": good, "label": label}
    for i in range(8)
    for good, label in (("ab" * (1 + i % 3), True), (f"no {i}", False))
]


@pytest.fixture
def kto(model, tmp_path):
    """Runs `trainjax kto` on the toy and returns the exit status."""

    def run(*flags, rows=ROWS):
        data = toy.write_jsonl(tmp_path / "labelled.jsonl", rows)
        settings = ["--model", model, "--data", data, "--out", tmp_path / "run"]
        settings += ["--batch-size", 8, "--max-length", 64, "--learning-rate", 2e-2]
        return cli.main(["kto", *map(str, [*settings, "--peft.rank", 4, *flags])])

    return run


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_a_run_learns_to_tell_good_from_bad(kto, packing, tmp_path):
    assert kto("--steps", 8, "--packing", packing) == 0
    first, *_, last = toy.trace(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)  # a fresh adapter is the reference
    assert last["rewards/accuracies"] > 0.9
    assert last["loss"] < first["loss"] - 0.01
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


BAD = {
    "beta=-1.0: it is above 0": (["--loss.beta", "-1"], ROWS),
    "row 1: `label` is true or false, this is 'good'": ([], [ROWS[0], ROWS[1] | {"label": "good"}]),
    "the column 'label' is missing": ([], [{"prompt": "a", "completion": "b"}]),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_one_clear_sentence(kto, capsys, sentence):
    flags, rows = BAD[sentence]
    assert kto("--steps", 1, *flags, rows=rows) == 1
    assert sentence in capsys.readouterr().err

"""`trainjax dpo`: pairs in, an adapter out that prefers the chosen completions; what it refuses."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest
import yaml

from tests import helpers, toy
from trainjax import cli
from trainjax.losses import preference
from trainjax.models import load, random_model, save_model
from trainjax.recipes import dpo as recipe

PAIRS = [
    {"prompt": f"say {i}", "chosen": "ab" * (1 + i % 3), "rejected": f"no {i}"} for i in range(16)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file with 16 pairs."""
    return toy.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture
def dpo(model, pairs, tmp_path):
    """Runs `trainjax dpo` on the toy and returns the exit status."""

    def run(*flags, **changes):
        settings = {
            "model": model,
            "data": pairs,
            "out": tmp_path / "run",
            "steps": 6,
            "batch-size": 8,
            "max-length": 64,
            "learning-rate": 2e-2,
            "peft.rank": 4,
        } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return cli.main(["dpo", *args, *map(str, flags)])

    return run


def test_an_optimizer_that_draws_labels_is_refused_before_anything_is_written(
    dpo, tmp_path, capsys
):
    assert dpo("--optim.name", "sophia_g") == 1
    assert "sophia_g estimates the curvature on labels" in capsys.readouterr().err
    assert dpo("--optim.name", "sophia_h", learning_rate=1e-3, steps=2) == 0


def test_a_run_learns_to_prefer_the_chosen_completions(dpo, pairs, tmp_path):
    assert dpo(eval_data=pairs, save_every=3) == 0
    first, *_, last = toy.trace(tmp_path / "run")
    assert abs(first["rewards/margins"]) < 1e-5  # a fresh adapter is the reference
    assert last["rewards/accuracies"] == 1
    assert last["loss"] < first["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["loss"]["name"] == ["sigmoid"]
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"eval_rewards/accuracies": 1.0' in records


def test_packed_pairs_train_too(dpo, tmp_path):
    assert dpo(packing="best-fit", batch_size=4, loss__name="ipo", loss__beta=0.5) == 0
    assert toy.trace(tmp_path / "run")[-1]["rewards/margins"] > 0


def test_a_loss_without_a_reference_and_one_with_supervision(dpo, tmp_path):
    assert dpo(loss__name="simpo", loss__gamma=0.5) == 0
    assert dpo(loss__sft=0.1, out=tmp_path / "other") == 0
    assert "mean_token_accuracy" in toy.trace(tmp_path / "other")[0]


def test_soft_labels_are_made_of_margins(dpo, tmp_path, capsys):
    assert dpo(loss__name="dno") == 1
    assert "dno learns from scores, and these pairs have none" in capsys.readouterr().err
    rows = [pair | {"margin": 2.0} for pair in PAIRS]
    data = toy.write_jsonl(tmp_path / "margins.jsonl", rows)
    assert dpo(loss__name="dno", data=data, out=tmp_path / "soft") == 0
    assert toy.trace(tmp_path / "soft")[-1]["rewards/accuracies"] == 1


def test_several_losses_are_added_with_their_weights(dpo, tmp_path):
    flags = ("--loss.name", "sigmoid", "simpo", "--loss.weight", 0.5, 2, "--loss.gamma", 0.2)
    assert dpo(*flags) == 0
    assert dpo("--resume", *flags) == 0  # a list of names is the same one when it is read back
    both = toy.trace(tmp_path / "run")[0]
    assert {"sigmoid/rewards/margins", "simpo/rewards/margins"} <= both.keys()
    alone = []
    for name, more in (("sigmoid", {}), ("simpo", {"loss__gamma": 0.2})):
        assert dpo(loss__name=name, out=tmp_path / name, **more) == 0
        alone.append(toy.trace(tmp_path / name)[0]["loss"])
    assert both["loss"] == pytest.approx(0.5 * alone[0] + 2 * alone[1], rel=1e-5)


def losses_of(run):
    return [record["loss"] for record in toy.trace(run)]


def test_a_cached_reference_trains_alike_and_is_computed_once(dpo, tmp_path, capsys):
    data = toy.write_jsonl(tmp_path / "own.jsonl", PAIRS)
    assert dpo(data=data) == 0
    for name in ("first", "second"):
        assert dpo("--cache-reference", data=data, eval_data=data, out=tmp_path / name) == 0
        np.testing.assert_allclose(losses_of(tmp_path / name), losses_of(tmp_path / "run"), 1e-5)
    said = capsys.readouterr().err
    assert said.count("computing the reference's log-probabilities") == 1
    assert (
        said.count("the reference's log-probabilities are in") == 3
    )  # as held-out rows, and again


def test_a_cached_reference_of_other_rows_is_refused(dpo, tmp_path, capsys):
    data = toy.write_jsonl(tmp_path / "own.jsonl", PAIRS)
    assert dpo("--cache-reference", data=data) == 0
    toy.write_jsonl(data, PAIRS[::-1])
    assert dpo("--cache-reference", data=data, out=tmp_path / "other") == 1
    assert "own.jsonl.reference.safetensors holds log-probabilities of other examples" in (
        capsys.readouterr().err
    )


def test_another_model_may_be_the_reference_if_it_has_the_same_tokens(dpo, tmp_path, capsys):
    model = load(toy.model_folder(tmp_path / "toy"))
    other = tmp_path / "moved"
    save_model(other, model, helpers.randomised(model.params, 0.12))
    assert dpo(reference=other) == 0
    assert dpo("--cache-reference", reference=other, out=tmp_path / "cached") == 0
    ours = toy.trace(tmp_path / "run")[0]
    assert abs(ours["rewards/margins"]) > 1e-3  # a fresh adapter is not that reference
    np.testing.assert_allclose(losses_of(tmp_path / "cached"), losses_of(tmp_path / "run"), 1e-5)
    small = tmp_path / "small"
    save_model(small, random_model(helpers.TINY, jax.random.key(0)))
    assert dpo(reference=small, out=tmp_path / "no") == 1
    assert "has vocab_size=61" in capsys.readouterr().err


def test_a_model_with_a_sliding_window_trains_on_prompts_of_their_own(dpo, tmp_path):
    folder = toy.model_folder(tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": None, "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    assert dpo(model=folder) == 0
    assert toy.trace(tmp_path / "run")[-1]["rewards/accuracies"] == 1


def test_a_resumed_run_with_another_loss_is_refused(dpo, capsys):
    assert dpo() == 0
    assert dpo("--resume", loss__beta=0.3) == 1
    assert "had loss.beta=None, now it is 0.3" in capsys.readouterr().err


def test_the_names_are_those_of_the_pair_losses():
    assert set(recipe.LossName.__args__) == set(preference.LOSSES)


def test_every_coefficient_of_a_pair_loss_has_an_option():
    parameters = (inspect.signature(f).parameters for f in preference.LOSSES.values())
    assert {name for names in parameters for name in list(names)[1:]} == set(recipe.COEFFICIENTS)
    assert set(recipe.COEFFICIENTS) <= {
        field.name for field in dataclasses.fields(recipe.LossConfig)
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss__beta": 0}, "beta=0.0: it is above 0"),
        ({"loss__gamma": 1.0}, "--loss.gamma has no meaning for sigmoid, which has beta, label"),
        ({"loss__label_smoothing": 0.5}, "label_smoothing=0.5: a share of wrong labels"),
        ({"loss__ld_alpha": 3}, "ld_alpha=3.0 is a weight from 0 to 1"),
        ({"loss__name": "ippo"}, "ippo"),
    ],
)
def test_bad_settings_are_one_clear_sentence(dpo, capsys, changes, sentence):
    assert dpo(**changes) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_weights_and_names_that_do_not_match_are_one_clear_sentence(dpo, capsys):
    assert dpo("--loss.name", "ipo", "hinge", "--loss.weight", 1) == 1
    assert "gives 1 numbers for 2 losses (ipo, hinge): one each" in capsys.readouterr().err
    assert dpo("--loss.name", "ipo", "ipo") == 1
    assert "ipo ipo: each loss once" in capsys.readouterr().err
    assert dpo("--loss.name", "ipo", "hnge") == 2
    assert "--loss.name is one of sigmoid" in capsys.readouterr().err


def test_rows_that_are_no_pairs_are_refused(dpo, rows, capsys):
    assert dpo(data=rows) == 1
    assert "rows.jsonl: row 0: the column 'chosen' is missing" in capsys.readouterr().err

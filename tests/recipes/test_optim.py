"""Optimizers, schedules, groups and precision by flags, and the two jobs about learning rates."""

import json

import numpy as np
import pytest
import yaml

from tests import toy
from trainjax import cli, optim
from trainjax.recipes import _optim, lr_find


def losses(run):
    return [record["loss"] for record in toy.trace(run)]


@pytest.mark.parametrize(
    ("name", "rate", "flags"),
    [
        ("lion", 1e-3, ["--optim.settings", "b1=0.95", "--param-dtype", "bfloat16"]),
        ("sophia_g", 3e-3, ["--optim.settings", "every=2"]),
        ("adamw_8bit", 1e-2, ["--dtype", "float16"]),
        (
            "muon",
            1e-2,
            [
                *("--schedule.name", "wsd", "--schedule.settings", "cooldown=0.5"),
                *("--optim.gradient", "sharpness_aware", "--optim.average", "0.5"),
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_trains_with_it(sft, tmp_path, name, rate, flags):
    assert sft("--optim.name", name, *flags, learning_rate=rate, steps=16) == 0
    found = losses(tmp_path / "run")
    assert np.mean(found[-4:]) < np.mean(found[:4])
    told = toy.trace(tmp_path / "run")[-1]
    assert ("loss_scale" in told) == ("float16" in flags)
    assert ("clipped" in told) == (name == "sophia_g")


def test_what_schedule_free_saves_is_the_average_that_it_evaluates(sft, rows, model, tmp_path):
    from trainjax import data, models, policy
    from trainjax import losses as all_losses

    flags = ["--optim.name", "schedule_free", "--schedule.name", "constant", "--eval-data", rows]
    assert sft(*flags, steps=12, learning_rate=3e-2) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (told,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    tuned = models.load(model, adapter=tmp_path / "run" / "adapter")
    examples = data.encode(data.read(rows), tuned.tokenizer, 64)
    loss = all_losses.sft(policy(tuned))
    batches = list(data.one_epoch(examples, data.Plan(4, 64)))
    found = sum(float(loss(tuned.params, batch)[0]) for batch in batches)
    assert found == pytest.approx(told, rel=1e-4)


def test_groups_freeze_and_scale_by_name(sft, model, tmp_path):
    import jax
    import safetensors.numpy

    from trainjax import models, peft

    groups = ["kernel/b$ learning_rate=4", "layers/0/ learning_rate=0", ".*"]
    assert sft("--optim.groups", *groups, steps=3, seed=3) == 0
    base, method = models.load(model), peft.lora(rank=4)
    first = method.init(jax.random.key(3), base.params)
    models.save_adapter(tmp_path / "start", base, method, first)
    now, start = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "run" / "adapter", tmp_path / "start")
    )
    same = {name for name in now if np.array_equal(now[name], start[name])}
    expected = {name for name in now if ".layers.0." in name and "lora_A" in name}
    assert same == expected


def test_groups_know_the_layers_of_an_adapter_that_holds_some(sft, tmp_path, capsys):
    import safetensors.numpy

    flags = ["--peft.name", "partial", "--peft.target", "layers/1/mlp/up/kernel"]
    small = {"steps": 2, "peft__rank": None}
    for out, group in {"still": "layers/1/ learning_rate=0", "moved": "layers/1/"}.items():
        assert sft(*flags, "--optim.groups", group, **small, out=tmp_path / out) == 0
    still, moved = (
        safetensors.numpy.load_file(next((tmp_path / name / "adapter").glob("*.safetensors")))
        for name in ("still", "moved")
    )
    (name,) = still
    assert still[name].shape[0] == 1
    assert np.abs(moved[name] - still[name]).max() > 0
    assert sft(*flags, "--optim.groups", "layers/0/", **small, out=tmp_path / "none") == 1
    assert "no group matches the parameter layers/1/mlp/up/kernel" in capsys.readouterr().err


def test_a_resumed_run_with_another_optimizer_is_refused(finished, run_sft, capsys):
    assert run_sft("--resume", "--optim.name", "lion", out=finished) == 1
    assert "had optim.name='adamw', now it is 'lion'" in capsys.readouterr().err


def test_a_run_is_repeated_from_its_settings(sft, tmp_path):
    flags = [
        "--optim.name",
        "lion",
        "--optim.settings",
        "b1=0.8",
        "b2=0.9",
        "--schedule.name",
        "linear",
    ]
    assert sft(*flags, "--optim.groups", "kernel/a weight_decay=0", ".*", steps=3) == 0
    again = tmp_path / "again"
    config = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(config.read_text())["optim"]["settings"] == ["b1=0.8", "b2=0.9"]
    assert cli.main(["sft", f"--config={config}", f"--out={again}"]) == 0
    assert toy.exact(again) == toy.exact(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--optim.name", "lino"], "not 'lino'; did you mean 'lion'?"),
        (["--optim.settings", "bb1=0.9"], "adamw has no setting 'bb1'; did you mean 'b1'?"),
        (["--optim.settings", "weight_decay=0.1"], "has a flag of its own, --weight-decay"),
        (["--optim.settings", "b1"], "b1: a setting is NAME=VALUE"),
        (["--optim.settings", "b1=high"], "b1 is a number, not 'high'"),
        (["--optim.settings", "b1=nan"], "b1 is a finite number"),
        (
            ["--optim.gradient-settings", "rho=1"],
            "backpropagation has no setting 'rho'; it has none",
        ),
        (["--optim.groups", "norm"], "no group matches the parameter"),
        (["--optim.groups", ".* lr=0.1"], "a group has no 'lr'; it has learning_rate"),
        (["--optim.groups", ".* learning_rate=low"], "learning_rate is a number, not 'low'"),
        (["--optim.groups", "learning_rate=0.1"], "a group is a regex and what is other for it"),
        (["--schedule.name", "cosin"], "not 'cosin'; did you mean 'cosine'?"),
        (["--schedule.settings", "ends=0"], "cosine has no setting 'ends'; did you mean 'end'?"),
        (["--schedule.steps", "4"], "the schedule ends before the run's 8 steps"),
        (["--schedule.name", "refined"], "refined needs --schedule.settings log=..."),
        (
            ["--schedule.name", "refined", "--schedule.settings", "log=nowhere.jsonl"],
            "log=nowhere.jsonl cannot be read",
        ),
        (["--warmup", "9"], "warmup=9.0 is not within the run's 8 steps"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 is negative"),
        (["--weight-decay", "-1"], "weight_decay=-1.0 is 0 or more"),
        (["--clip", "0"], "clip=0.0: a norm to clip at is above 0"),
    ],
)
def test_what_is_wrong_gets_one_sentence(sft, capsys, flags, sentence):
    assert sft(*flags) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("error:") == 1


def test_a_schedule_is_refined_from_an_earlier_runs_log(finished, sft, tmp_path):
    log = f"log={finished / 'metrics.jsonl'}"
    assert sft("--schedule.name", "refined", "--schedule.settings", log, out=tmp_path / "next") == 0
    norms = [record["grad_norm"] for record in toy.trace(finished)]
    expected = optim.refined(1e-2, 8, 0.03, grad_norms=norms)
    found = [record["learning_rate"] for record in toy.trace(tmp_path / "next")]
    np.testing.assert_allclose(found, [float(expected(step)) for step in range(8)], rtol=1e-5)


def test_every_name_has_settings_that_can_be_told(capsys):
    """Each function's settings are found, so that a typo can be answered."""
    for names in (_optim.OPTIMIZERS, _optim.SCHEDULES, _optim.GRADIENTS):
        for name, make in names.items():
            with pytest.raises(ValueError, match=f"{name} has no setting 'nothing_like_it'"):
                _optim.given(make, ["nothing_like_it=1"], name, "--flag")


# --- lr-find --------------------------------------------------------------------------------------


def curve(losses):
    rates = np.geomspace(1e-6, 1.0, len(losses))
    return [lr_find.Point(float(r), float(v), float(v)) for r, v in zip(rates, losses, strict=True)]


def test_the_suggestion_is_a_tenth_of_the_rate_where_the_loss_is_least():
    """Flat, down between 1e-4 and 1e-2, steepest at 1e-3, then up."""
    logs = np.linspace(-6, 0, 61)
    found = lr_find.suggestion(
        curve(4 - 3 / (1 + np.exp(-4 * (logs + 3))) + 10.0 ** (2 * (logs + 0.7)))
    )
    assert found.steepest == pytest.approx(1e-3, rel=0.3)
    assert 1e-2 < found.largest < 1e-1
    assert found.learning_rate == pytest.approx(found.largest / 10)


def test_a_curve_that_says_nothing_is_told():
    with pytest.raises(ValueError, match="gone after 4 steps, too few"):
        lr_find.suggestion(curve([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="never fell between the rates 1e-06 and 1"):
        lr_find.suggestion(curve(np.arange(20.0)))


def test_lr_find_leaves_curve_picture_and_a_rate(model, rows, tmp_path, capsys):
    out = tmp_path / "found"
    flags = ["--model", model, "--data", rows, "--out", out, "--steps", "60", "--batch-size", "4"]
    flags += ["--max-length", "64", "--peft.rank", "4", "--low", "1e-4", "--high", "10"]
    assert cli.main(["lr-find", *map(str, flags)]) == 0
    captured = capsys.readouterr()
    rate = float(captured.out.split()[-1])
    points = [json.loads(line) for line in (out / "lr_find.jsonl").read_text().splitlines()]
    assert 10 <= len(points) <= 60
    assert points[0]["learning_rate"] == pytest.approx(1e-4, rel=1e-3)
    assert points[0]["learning_rate"] < rate < points[-1]["learning_rate"]
    least = min(points, key=lambda point: point["smooth"])
    assert rate == pytest.approx(least["learning_rate"] / 10, rel=0.06)
    assert (out / "lr_find.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning-rate", "1"], "lr-find makes the rates itself"),
        (["--low", "1", "--high", "0.1"], "low=1.0 and high=0.1"),
        (["--leave", "1"], "leave=1.0 times the least loss is above 1"),
        (["--smoothing", "1"], "smoothing=1.0 is a share"),
        (["--steps", "4"], "gone after 4 steps, too few"),
    ],
)
def test_lr_find_says_what_is_wrong(model, rows, tmp_path, capsys, flags, sentence):
    args = ["--model", model, "--data", rows, "--out", tmp_path / "found", *flags]
    assert cli.main(["lr-find", *map(str, args)]) == 1
    assert sentence in capsys.readouterr().err


# --- plot-schedule --------------------------------------------------------------------------------


def test_plot_schedule_draws_and_tells_the_turns(tmp_path, capsys):
    out = tmp_path / "s.png"
    args = ["--steps", "100", "--learning-rate", "1e-3", "--warmup", "10", "--schedule.name", "wsd"]
    assert cli.main(["plot-schedule", *args, "--compare", "cosine", "step", "--out", str(out)]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[1], line[3]) for line in told] == [
        ("1", "0"),
        ("11", "0.001"),
        ("51", "0.001"),
        ("100", "5e-05"),
    ]
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0"], "steps=0: a run has at least one"),
        (["--steps", "10", "--compare", "cosin"], "did you mean 'cosine'"),
        (["--steps", "10", "--schedule.steps", "5"], "ends before the run's 10 steps"),
    ],
)
def test_plot_schedule_says_what_is_wrong(capsys, flags, sentence):
    assert cli.main(["plot-schedule", *flags]) in (1, 2)
    assert sentence in capsys.readouterr().err

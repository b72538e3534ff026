"""`trainjax reward`, `score` and `merge`: pairs in, a model that scores out; what they refuse."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import trainjax as tj
from tests import toy
from trainjax import cli, data, evals
from trainjax.models import load_scorer

PAIRS = [
    {"prompt": f"say {i}", "chosen": "ab" * (1 + i % 3), "rejected": f"no {i}"} for i in range(16)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file with 16 pairs."""
    return toy.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def flags_of(settings):
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run_reward(model, pairs):
    """Runs `trainjax reward` on the toy and returns the exit status."""

    def run(*flags, **changes):
        settings = {
            "model": model,
            "data": pairs,
            "steps": 6,
            "batch-size": 8,
            "max-length": 64,
            "learning-rate": 2e-2,
            "peft.rank": 4,
        }
        return cli.main(["reward", *flags_of(settings | changes), *map(str, flags)])

    return run


@pytest.fixture
def reward(run_reward, tmp_path):
    """`run_reward` into the test's own folder, `run`."""
    return lambda *flags, **changes: run_reward(*flags, **({"out": tmp_path / "run"} | changes))


@pytest.fixture(scope="module")
def rewarded(run_reward, pairs, tmp_path_factory):
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("rewarded") / "run"
    assert run_reward(out=run, eval_data=pairs, center_rewards_coefficient=0.01) == 0
    return run


@pytest.fixture
def score(model, pairs, tmp_path):
    """Runs `trainjax score` and returns the exit status."""

    def run(*flags, **changes):
        settings = {"model": model, "data": pairs, "out": tmp_path / "scored.jsonl"}
        return cli.main(["score", *flags_of(settings | changes), *map(str, flags)])

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def said(capsys):
    """The one sentence that a job ended with."""

    def last():
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err.strip().splitlines()[-1]

    return last


class TestReward:
    def test_a_run_learns_to_score_the_chosen_completions_higher(self, rewarded):
        first, *_, last = toy.trace(rewarded)
        assert abs(first["margin"]) < 0.5
        assert last["accuracy"] == 1
        assert last["loss"] < first["loss"]
        records = lines(rewarded / "metrics.jsonl")
        assert [r["eval_accuracy"] for r in records if "eval_accuracy" in r] == [1.0]
        config = json.loads((rewarded / "adapter" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])

    def test_packed_pairs_with_margins_train_too(self, reward, tmp_path):
        settings = {"packing": "best-fit", "batch_size": 4, "steps": 2, "learning_rate": 1e-3}
        for name, margin in (("plain", 0.0), ("wide", 1.0)):
            rows = [row | {"margin": margin} for row in PAIRS]
            data = toy.write_jsonl(tmp_path / f"{name}.jsonl", rows)
            assert reward(**settings, data=data, out=tmp_path / name) == 0
        plain, wide = (toy.trace(tmp_path / run)[0]["loss"] for run in ("plain", "wide"))
        # -log sigmoid(d - 1) is above -log sigmoid(d) by 0.62 at d = 0
        assert 0.5 < wide - plain < 0.75

    def test_full_training_writes_a_reward_models_folder(self, reward, score, tmp_path):
        for flags in ((), ("--resume",)):
            assert reward("--full", *flags, steps=3, learning_rate=1e-3) == 0
        assert score(model=tmp_path / "run" / "model") == 0
        assert len(lines(tmp_path / "scored.jsonl")) == 16

    def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_coefficient(
        self, reward, tmp_path, capsys
    ):
        assert reward(save_every=3) == 0
        whole = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        (tmp_path / "run" / "checkpoints" / "6" / "manifest.json").write_text("")
        assert reward("--resume", save_every=3) == 0
        again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert whole.keys() == again.keys()
        for name, tensor in whole.items():
            np.testing.assert_array_equal(again[name], tensor)
        assert reward("--resume", center_rewards_coefficient=0.5) == 1
        assert "had center_rewards_coefficient=0.0, now it is 0.5" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("rows", "sentence"),
        [
            ([{"prompt": "a", "completion": "b"}], "row 0: the column 'chosen' is missing"),
            (
                [{"prompt": "a", "chosen": "x", "rejected": "x"}],
                "none of the 1 rows can be compared: its completions are equal, or one is empty",
            ),
            (
                [{"prompt": "a", "chosen": "x", "rejected": ""}],
                "none of the 1 rows can be compared: its completions are equal, or one is empty",
            ),
            (
                [{"prompt": "a", "chosen": "x", "rejected": "y", "margin": "nan"}],
                "row 0: `margin` is a finite number, this is 'nan'",
            ),
        ],
        ids=["no pairs", "equal", "empty", "margin"],
    )
    def test_rows_that_cannot_be_compared_are_one_clear_sentence(
        self, reward, tmp_path, said, rows, sentence
    ):
        assert reward(data=toy.write_jsonl(tmp_path / "bad.jsonl", rows)) == 1
        assert said() == f"error: {tmp_path}/bad.jsonl: {sentence}"

    def test_a_bad_coefficient_is_one_clear_sentence(self, reward, said):
        assert reward(score_bound=-1) == 1
        assert "score_bound=-1.0 leaves scores no room" in said()
        assert reward(center_rewards_coefficient=-1) == 1
        assert "center_rewards_coefficient=-1.0 drives scores apart" in said()

    def test_a_model_that_only_scores_is_no_beginning_for_one(
        self, rewarded, reward, tmp_path, said
    ):
        merged = tmp_path / "merged"
        model = json.loads((rewarded / "adapter" / "adapter_config.json").read_text())
        base = model["base_model_name_or_path"]
        args = flags_of({"model": base, "adapter": rewarded, "out": merged})
        assert cli.main(["merge", *args]) == 0
        assert reward(model=merged) == 1
        assert "is a reward model: it has score.weight" in said()


class TestScore:
    def test_pairs_get_two_scores_and_a_report(self, rewarded, model, score, tmp_path, capsys):
        assert score(adapter=rewarded) == 0
        rows = lines(tmp_path / "scored.jsonl")
        assert [{k: row[k] for k in PAIRS[0]} for row in rows] == PAIRS
        assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
        assert "accuracy 1.000, margin " in capsys.readouterr().out
        base, method, params = load_scorer(model, adapter=rewarded)
        examples = data.encode_groups(PAIRS, base.tokenizer, 64)
        plan = data.Plan(16, 128, data.best_fit)
        expected = evals.scores(tj.scorer(base, method), params, examples, plan)
        found = [[row["chosen_score"], row["rejected_score"]] for row in rows]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_a_completion_or_a_conversation_gets_the_score_that_it_has_in_a_pair(
        self, rewarded, score, tmp_path
    ):
        assert score(adapter=rewarded) == 0
        expected = [row["chosen_score"] for row in lines(tmp_path / "scored.jsonl")]
        prompts = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
        talks = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"]},
                ]
            }
            for row in PAIRS
        ]
        for name, rows in (("prompts", prompts), ("talks", talks)):
            file, out = toy.write_jsonl(tmp_path / name, rows), tmp_path / f"{name}.jsonl"
            file = file.rename(file.with_suffix(".rows.jsonl"))
            assert score(adapter=rewarded, data=file, out=out, batch_size=4) == 0
            found = [row["score"] for row in lines(out)]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_a_merged_reward_model_scores_the_same(self, rewarded, model, score, tmp_path):
        args = flags_of({"model": model, "adapter": rewarded, "out": tmp_path / "merged"})
        assert cli.main(["merge", *args]) == 0
        assert score(adapter=rewarded) == 0
        assert score(model=tmp_path / "merged", out=tmp_path / "other.jsonl") == 0
        first, second = (
            [row["chosen_score"] for row in lines(tmp_path / name)]
            for name in ("scored.jsonl", "other.jsonl")
        )
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-4)

    def test_scores_that_are_not_numbers_are_refused(self, rewarded, score, tmp_path, said):
        broken = shutil.copytree(rewarded / "adapter", tmp_path / "broken")
        file = broken / "adapter_model.safetensors"
        tensors = load_file(file)
        name = "base_model.model.score.weight"
        save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, file)
        assert score(adapter=broken) == 1
        assert "16 of 16 rows have a score that is not a finite number, row 0 first" in said()
        assert not (tmp_path / "scored.jsonl").exists()

    def test_an_adapter_that_generates_cannot_score(self, finished, score, said):
        assert score(adapter=finished) == 1
        assert "is an adapter of task_type='CAUSAL_LM' without score.weight, so it cannot" in said()

    def test_a_model_that_generates_cannot_score(self, score, said):
        assert score() == 1
        assert "has no score.weight, so it cannot score; give a reward model's folder" in said()

    def test_a_scoring_adapter_cannot_generate(self, rewarded, model, said):
        args = flags_of({"model": model, "adapter": rewarded, "prompt": "a"})
        assert cli.main(["generate", *args]) == 1
        assert "is the adapter of a reward model, which scores texts and makes none" in said()

    def test_a_file_is_not_written_over(self, score, tmp_path, said):
        (tmp_path / "scored.jsonl").write_text("mine")
        assert score() == 1
        assert "scored.jsonl exists already; give the name of a new file" in said()
        assert (tmp_path / "scored.jsonl").read_text() == "mine"

    @pytest.mark.parametrize(
        ("rows", "sentence"),
        [
            ([{"chosen": "x", "prompt": "a"}], "row 0: the column 'rejected' is missing"),
            ([{"question": "a"}], "row 0: the columns are question; accepted are: messages; "),
            ([{"prompt": "a", "completion": ""}], "row 0: a completion is empty: ''"),
            (
                [
                    {"messages": [{"role": role, "content": "a"} for role in roles]}
                    for roles in (["user", "assistant"], ["user"])
                ],
                "row 1: nothing to score: no completion, an empty one, or two that are equal",
            ),
            ([{"prompt": "a" * 2000, "completion": "b"}], "tokens are more than max_length=1024"),
        ],
        ids=["half a pair", "columns", "empty", "no answer", "long"],
    )
    def test_rows_that_cannot_be_scored_are_one_clear_sentence(
        self, rewarded, score, tmp_path, said, rows, sentence
    ):
        file = toy.write_jsonl(tmp_path / "bad.jsonl", rows)
        assert score(adapter=rewarded, data=file) == 1
        told = said()
        assert sentence in told
        assert f"{tmp_path}/bad.jsonl: " in told

"""The real model's answers, against those of transformers."""

import dataclasses
import json

import pytest

import trainjax as tj
from tests import helpers
from trainjax.rollout import prompt_ids

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.usefixtures("optimised")]


@pytest.fixture(scope="module")
def model():
    """SmolLM2 in float32, with no end-of-sequence token: answers go to their full length."""
    try:
        loaded = tj.load("smollm2-135m-instruct")
    except ValueError as error:
        pytest.skip(str(error))
    loaded.tokenizer.eos_token = None
    return dataclasses.replace(loaded, hf={})


def test_64_greedy_tokens_on_ten_prompts_are_those_of_transformers(model):
    rows = json.loads((helpers.GOLDEN / "smollm2_generation.json").read_text())["rows"]
    assert len(rows) == 10
    answers = tj.generate(model, [row["prompt_ids"] for row in rows], max_new_tokens=64)
    assert [answer.tokens for answer in answers] == [row["tokens"] for row in rows]


def test_prompts_are_encoded_as_they_were_there(model):
    for row in json.loads((helpers.GOLDEN / "smollm2_generation.json").read_text())["rows"]:
        assert prompt_ids(model.tokenizer, row["prompt"]) == row["prompt_ids"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers_live(model, tmp_path):
    from tests.golden.make_smollm2_generation import generated

    prompts = [prompt_ids(model.tokenizer, text) for text in ("Name a colour.", "What is rain?")]
    tj.save_model(tmp_path / "model", tj.load("smollm2-135m-instruct"))
    expected = generated(tmp_path / "model", prompts)
    assert [a.tokens for a in tj.generate(model, prompts, max_new_tokens=64)] == expected

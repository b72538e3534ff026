import jax
import pytest

import trainjax as tj
from tests import toy
from trainjax import models
from trainjax.evals import exact_match
from trainjax.rollout import prompt_ids


@pytest.fixture(scope="module")
def model():
    return models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())


def test_the_score_is_the_share_of_answers_that_are_the_reference(model):
    asked = [[{"role": "user", "content": text}] for text in ("a", "bb", "ccc", "dddd")]
    ids = [prompt_ids(model.tokenizer, messages) for messages in asked]
    answers = [answer.text for answer in tj.generate(model, ids, max_new_tokens=8, batch_size=3)]
    said = [f" {answers[0]}\n", "wrong", answers[2], answers[3]]
    rows = [
        {"messages": [*messages, {"role": "assistant", "content": text}], "task": task}
        for messages, text, task in zip(asked, said, "xxyy", strict=True)
    ]
    found = exact_match(model, rows, max_new_tokens=8, batch_size=3)
    assert found == (0.75, {"x": 0.5, "y": 1.0}, answers)


def test_nothing_to_evaluate_on_is_said(model):
    with pytest.raises(ValueError, match="no rows"):
        exact_match(model, [])

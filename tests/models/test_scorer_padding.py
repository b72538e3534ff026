"""A reward model whose base pads with the end of a text: one number, whoever computes it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers, toy
from trainjax import data, evals
from trainjax.io.tokenizer import from_folder
from trainjax.models import Model, random_model, save_model, save_scorer
from trainjax.nn import body
from trainjax.peft import lora
from trainjax.scorers import last_token_scores

END = 2  # the toy's end of a text, which its tokenizer pads with
LORA = lora(rank=2, alpha=4.0)
ROWS = [{"prompt": f"say {'a' * i}", "completion": "b" * (4 - i)} for i in range(3)]


def base() -> Model:
    """A base whose config pads with the end too."""
    hf = toy.CONFIG | {"num_hidden_layers": 1, "pad_token_id": END}
    return random_model(hf, jax.random.key(0), tokenizer=toy.tokenizer())


def trained(model: Model):
    params = tj.init_scorer(jax.random.key(0), model, LORA)
    head = helpers.randomised(params["score"])
    return {"body": helpers.trained(LORA, model.params), "score": head}


def merged(model: Model, params):
    return params | {"body": LORA.merge(body(model.params), params["body"])}


def scores(model: Model, method, params) -> np.ndarray:
    """Of the rows without a template, so that the end token is the last of each."""
    examples = data.encode_groups(ROWS, model.tokenizer, 64, read=data.single, template=False)
    plan = data.Plan(3, 64, data.unpacked)
    return evals.scores(tj.scorer(model, method, size=1), params, examples, plan)


def test_a_completion_is_scored_at_its_last_token_that_is_no_padding():
    """The states are 0, 1, ..., 5; the second completion is nothing but padding, the third is not there."""
    hidden = jnp.arange(6.0)[None, :, None]
    completions = jnp.asarray([[0, 1, 1, 1, 2, 2]])
    padded = jnp.asarray([[False, False, False, True, True, True]])
    found = last_token_scores(hidden, jnp.ones((1, 1)), completions, 3, padded)
    np.testing.assert_array_equal(found, [[[2.0], [5.0], [0.0]]])


def test_a_merged_reward_model_pads_with_what_its_base_does(tmp_path):
    """The scorer knows the token, so it scores the one that transformers does."""
    model = base()
    save_scorer(tmp_path / "out", model, None, tj.init_scorer(jax.random.key(0), model))
    assert from_folder(tmp_path / "out").pad_token_id == END
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == END
    assert tj.scorer(model).padding == END


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_give_the_number_of_here(tmp_path):
    import peft
    import torch
    import transformers

    model = base()
    save_model(tmp_path / "base", model)
    params = trained(model)
    save_scorer(tmp_path / "adapter", model, LORA, params)
    save_scorer(tmp_path / "merged", model, None, merged(model, params))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    adapted = classifier(tmp_path / "base", num_labels=1)
    both = [
        peft.PeftModel.from_pretrained(adapted, tmp_path / "adapter"),
        classifier(tmp_path / "merged"),
    ]
    texts = [row["prompt"] + row["completion"] + "<|im_end|>" for row in ROWS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    expected = scores(model, LORA, params)
    assert np.ptp(expected) > 0.1
    for theirs in both:
        with torch.no_grad():
            found = theirs.eval()(**inputs).logits.numpy()
        np.testing.assert_allclose(found.ravel(), expected.ravel(), atol=1e-5)

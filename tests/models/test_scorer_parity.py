"""Live comparison of scores with transformers' sequence classifiers, and with PEFT over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import trainjax as tj
from tests import families, helpers, toy
from trainjax import data, evals
from trainjax.models import load, load_scorer, save_scorer
from trainjax.peft import lora
from trainjax.types import Params

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: deprecations of one another
]

PAD = 0
TEXTS = [
    np.random.default_rng(i).integers(1, 48, size).astype(np.int32)
    for i, size in enumerate((9, 3, 7, 5, 11))
]
FAMILIES = ["llama_grouped", "llama_tied", "llama_biased_llama3", "mistral_window", "qwen2"]
NAMES = pytest.mark.parametrize("name", FAMILIES)


def classifier(path: Path, **options: Any) -> Any:
    import transformers

    found = transformers.AutoModelForSequenceClassification.from_pretrained(path, **options)
    found.config.pad_token_id = PAD
    return found.eval()


def torch_classifier(name: str, labels: int = 1) -> Any:
    """A random sequence classifier of the family."""
    import transformers

    family, settings = families.FAMILIES[name]
    sizes = families._SIZES | {"pad_token_id": PAD, "num_labels": labels}
    config = getattr(transformers, f"{family}Config")(**sizes | settings)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    return families.torch_randomised(model, seed=name)


def torch_scores(model: Any, side: str = "right") -> np.ndarray:
    """Of all texts in one batch, padded on a side."""
    import torch

    longest = max(map(len, TEXTS))
    ids, mask = np.full((len(TEXTS), longest), PAD), np.zeros((len(TEXTS), longest), int)
    for row, text in enumerate(TEXTS):
        here = slice(0, len(text)) if side == "right" else slice(longest - len(text), None)
        ids[row, here], mask[row, here] = text, 1
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask))
    return out.logits.float().numpy()


def our_scores(model: Any, method: Any, params: Params) -> np.ndarray:
    """Of all texts, packed in two rows."""
    batch = dict(helpers.packed(TEXTS, [[0, 1, 2], [3, 4]], seq=21))
    batch |= {"completions": batch["segments"], "groups": np.ones((2, 3), np.float32)}
    scores = jax.jit(lambda scorer, *args: scorer(*args))(
        tj.scorer(model, method, size=1), params, batch
    )
    return np.asarray(scores).reshape(6, -1)[[0, 1, 2, 3, 4]]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.1
    helpers.assert_close({"scores": found}, {"scores": expected}, 1e-5)


@pytest.mark.parametrize(
    ("name", "labels"),
    # One label of every family: the reward models below.
    [("llama_grouped", 1), *((name, 3) for name in FAMILIES)],
)
def test_a_classifier_of_transformers_scores_the_same_here(tmp_path, name, labels):
    theirs = torch_classifier(name, labels)
    theirs.save_pretrained(tmp_path)
    found = our_scores(*load_scorer(tmp_path))
    assert_same(found, torch_scores(theirs))
    if name != "mistral_window":  # its window counts padding on the left
        assert_same(found, torch_scores(theirs, "left"))


@NAMES
def test_a_reward_model_made_here_scores_the_same_in_transformers(tmp_path, name):
    families.torch_model(name).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    params = tj.init_scorer(jax.random.key(0), model)
    params["score"] = helpers.randomised(params["score"])
    save_scorer(tmp_path / "out", model, None, params)
    theirs = classifier(tmp_path / "out")
    assert theirs.config.num_labels == 1
    assert_same(our_scores(model, None, params), torch_scores(theirs))


def torch_adapter(base: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    wrapped = families.torch_randomised(peft.get_peft_model(base, config).eval(), only="lora_")
    return families.torch_randomised(wrapped, only="score", seed="score")


@pytest.mark.parametrize("base", ["causal", "classifier"])
def test_an_adapter_of_peft_scores_the_same_here(tmp_path, base):
    make = families.torch_model if base == "causal" else torch_classifier
    make("llama_grouped").save_pretrained(tmp_path / "base")
    theirs = torch_adapter(classifier(tmp_path / "base", num_labels=1))
    theirs.save_pretrained(tmp_path / "adapter")
    found = our_scores(*load_scorer(tmp_path / "base", adapter=tmp_path / "adapter"))
    assert_same(found, torch_scores(theirs))


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2"])
def test_an_adapter_made_here_scores_the_same_in_peft(tmp_path, name):
    import peft

    families.torch_model(name).save_pretrained(tmp_path / "base")
    model, method = load(tmp_path / "base"), lora(rank=3, alpha=5.0)
    params = tj.init_scorer(jax.random.key(0), model, method)
    params = {
        "body": helpers.trained(method, model.params),
        "score": helpers.randomised(params["score"]),
    }
    save_scorer(tmp_path / "adapter", model, method, params)
    base = classifier(tmp_path / "base", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(our_scores(model, method, params), torch_scores(theirs))


def test_rows_of_text_score_the_same_in_transformers(tmp_path):
    """By the saved folder's own tokenizer and template, in a padded batch."""
    import torch
    import transformers

    model = load(toy.model_folder(tmp_path / "base"))
    params = tj.init_scorer(jax.random.key(0), model)
    params["score"] = helpers.randomised(params["score"])
    save_scorer(tmp_path / "out", model, None, params)
    rows = [{"prompt": f"say {'a' * i}", "completion": "b" * (5 - i)} for i in range(5)]
    examples = data.encode_groups(rows, model.tokenizer, 64, read=data.single)
    plan = data.Plan(2, 64, data.unpacked)
    found = evals.scores(tj.scorer(model, None, size=1), params, examples, plan)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = [f"{row['prompt']}{row['completion']}<|im_end|>" for row in rows]  # ends with the end
    talks = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        for row in rows
    ]
    texts = tokenizer.apply_chat_template(talks, tokenize=False)
    with torch.no_grad():
        expected = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
        ended = theirs(**tokenizer(plain, padding=True, return_tensors="pt")).logits.numpy()
    assert_same(found, expected)
    bare = data.encode_groups(rows, model.tokenizer, 64, read=data.single, template=False)
    assert_same(evals.scores(tj.scorer(model, None, size=1), params, bare, plan), ended)

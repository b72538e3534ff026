"""What generation is asked and where it stops: end tokens, raw prompts, ids and characters there are not."""

import dataclasses

import pytest
from tokenizers import processors

import trainjax as tj
from tests import toy
from trainjax import models
from trainjax.models import llama
from trainjax.nn import Decoder
from trainjax.rollout import greedy, prompt_ids, sampler
from trainjax.rollout.decoding import _end_ids


@pytest.fixture(scope="module")
def model():
    """Without weights: what is asked is looked at before any is read."""
    config = llama.config(toy.CONFIG)
    return models.Model(config, Decoder(config), {}, toy.tokenizer(), toy.CONFIG, "toy", "")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, 7, [2, 7]),
        ({}, [7, 8], [2, 7, 8]),
        ({"eos_token_id": 9}, 7, [2, 9]),
        ({"eos_token_id": [9, 10]}, 7, [2, 9, 10]),
        ({"temperature": 0.6}, None, [2]),
    ],
)
def test_generation_settings_name_the_end_tokens_before_the_config(
    model, generation, config, expected
):
    """2 is the tokenizer's."""
    hf = {**model.hf, "eos_token_id": config}
    assert _end_ids(dataclasses.replace(model, hf=hf, generation=generation)) == expected


def test_a_prompt_with_a_token_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1: token 259 is not in the vocabulary"):
        tj.generate(model, [[70], [70, 259]], max_new_tokens=1)


def bracketing(single: str):
    """The toy's tokenizer with a template of what it puts around a text."""
    tokenizer = toy.tokenizer.__wrapped__()
    special = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("<|im_start|> $A <|endoftext|>", [1]),
        ("<|im_start|> $A", [1]),
        ("$A <|endoftext|>", []),
        ("$A", []),
    ],
)
def test_a_raw_prompt_begins_with_one_beginning_token_and_does_not_end(template, before):
    tokenizer = bracketing(template)
    a = prompt_ids(toy.tokenizer(), "a", raw=True)
    assert prompt_ids(tokenizer, "a", raw=True) == before + a
    assert prompt_ids(tokenizer, "<|im_start|>a", raw=True) == [1, *a]
    if before:
        assert prompt_ids(tokenizer, "", raw=True) == before


@pytest.mark.parametrize("raw", [True, False])
def test_half_of_a_surrogate_pair_is_refused(raw):
    with pytest.raises(ValueError, match=r"holds '\\ud83d', half of a surrogate pair"):
        prompt_ids(toy.tokenizer(), "a\ud83d", raw=raw)


def test_a_temperature_too_small_to_divide_by_is_greedy():
    assert sampler(1e-40) == greedy
    assert sampler(1e-5).temperature is not None

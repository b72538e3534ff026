import dataclasses
import functools
import logging
import re

import jax
import numpy as np
import pytest

import trainjax as tj
from tests import toy
from trainjax import models
from trainjax.peft.prefix import prefix
from trainjax.peft.prompt import prompt
from trainjax.rollout import prompt_ids, sampler, stream

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96], [100] * 70]


@pytest.fixture(scope="module")
def model():
    """Weights four times as large as usual, so that answers depend on the whole prompt."""
    made = models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())
    return made.with_params(jax.tree.map(lambda w: 4 * w if w.ndim > 2 else w, made.params))


def without_cache(model, prompt, count):
    """Greedy tokens and their log-probabilities by the whole text again for every token."""
    tokens, logprobs = list(prompt), []
    padded = np.zeros((1, 160), np.int32)
    for _ in range(count):
        padded[0, : len(tokens)] = tokens
        row = np.asarray(model.logits(padded), np.float64)[0, len(tokens) - 1]
        row -= np.logaddexp.reduce(row)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


def test_a_batch_of_unequal_prompts_gives_what_each_gives_without_cache_or_padding(model):
    found = tj.generate(model, PROMPTS, max_new_tokens=20)
    for text, answer in zip(PROMPTS, found, strict=True):
        tokens, logprobs = without_cache(model, text, 20)
        assert answer.tokens == tokens
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=2e-5)
        assert answer.finish_reason == "length"
    assert len({tuple(answer.tokens) for answer in found}) == len(PROMPTS)


def test_a_long_prompt_goes_through_in_pieces(model):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=2048))
    prompt = np.random.default_rng(0).integers(3, 259, 700).tolist()
    (answer,) = tj.generate(model, [prompt], max_new_tokens=1)
    row = jax.nn.log_softmax(model.logits(np.asarray([prompt]))[0, -1])
    assert answer.tokens == [int(row.argmax())]
    np.testing.assert_allclose(answer.logprobs, [row.max()], atol=2e-5)


@functools.cache
def mistral(window):
    """As `model`, in a family that may have a sliding window."""
    changes = {"model_type": "mistral", "sliding_window": window}
    made = models.random_model(toy.CONFIG | changes, jax.random.key(1), tokenizer=toy.tokenizer())
    return made.with_params(jax.tree.map(lambda w: 4 * w if w.ndim > 2 else w, made.params))


@pytest.mark.parametrize("window", [None, 9])
def test_a_sliding_window_holds_in_the_cache_too(window):
    model = mistral(window)
    (answer,) = tj.generate(model, PROMPTS[2:3], max_new_tokens=12)
    assert answer.tokens == without_cache(model, PROMPTS[2], 12)[0]


@pytest.mark.parametrize(
    ("method", "window"),
    [(prompt(3), 9), (prefix(3), 9), (prefix(3), None)],
    ids=["prompt, window", "prefix, window", "prefix"],
)
def test_virtual_tokens_are_in_the_cache_as_in_the_whole_text(method, window):
    """Of prompts of unequal length: padding is between the virtual tokens' slots and the text's."""
    base = mistral(window)
    adapter = jax.tree.map(lambda x: 2 * x, method.init(jax.random.key(2), base.params))
    model = base.with_params(method.attach(base.params, adapter))
    found = tj.generate(model, PROMPTS[:3], max_new_tokens=12)
    for text, answer in zip(PROMPTS, found, strict=False):
        tokens, logprobs = without_cache(model, text, 12)
        assert answer.tokens == tokens
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=2e-5)
    plain = [without_cache(base, text, 12)[0] for text in PROMPTS[:3]]
    assert [answer.tokens for answer in found] != plain


def test_virtual_tokens_count_in_the_models_length(model):
    method = prefix(3)
    params = method.attach(model.params, method.init(jax.random.key(0), model.params))
    with pytest.raises(ValueError, match="500 tokens after 3 virtual ones; with max_new_tokens=10"):
        tj.generate(model.with_params(params), [[70] * 500], max_new_tokens=10)


def test_an_end_token_ends_an_answer_and_is_its_last(model):
    free = tj.generate(model, PROMPTS, max_new_tokens=12)
    end = free[0].tokens[4]
    stopping = dataclasses.replace(model, hf={**model.hf, "eos_token_id": [end, 258]})
    for before, after in zip(free, tj.generate(stopping, PROMPTS, max_new_tokens=12), strict=True):
        count = before.tokens.index(end) + 1 if end in before.tokens else 12
        assert after.tokens == before.tokens[:count]
        assert after.finish_reason == ("stop" if end in before.tokens else "length")
        assert len(after.logprobs) == len(after.sampler_logprobs) == count


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(model):
    free = tj.generate(model, PROMPTS, max_new_tokens=40)
    stop = free[0].text[3:5]
    (answer, *_) = tj.generate(model, PROMPTS, max_new_tokens=40, stop=["not there", stop])
    assert answer.text == free[0].text[: free[0].text.index(stop)]
    assert stop in model.tokenizer.decode(answer.tokens)
    assert stop not in model.tokenizer.decode(answer.tokens[:-1])
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("stops", [0, 1])
def test_a_stream_is_the_answer_in_pieces(model, stops):
    (answer,) = tj.generate(model, PROMPTS[:1], max_new_tokens=30)
    stop = [answer.text[9:12]] * stops
    (answer,) = tj.generate(model, PROMPTS[:1], max_new_tokens=30, stop=stop)
    pieces = list(stream(model, PROMPTS[0], max_new_tokens=30, stop=stop))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3


def test_samples_depend_on_key_and_prompt_and_not_on_the_batch(model):
    ask = lambda batch_size, key: [  # noqa: E731
        answer.tokens
        for answer in tj.generate(
            model, PROMPTS, max_new_tokens=9, sampler=sampler(), key=key, batch_size=batch_size
        )
    ]
    together = ask(4, jax.random.key(3))
    assert ask(3, jax.random.key(3)) == together
    assert ask(4, jax.random.key(4)) != together


def test_rows_with_one_prompt_draw_apart(model):
    asked = {"max_new_tokens": 9, "sampler": sampler(), "key": jax.random.key(0)}
    first, second, *_ = tj.generate(model, [*PROMPTS[:1] * 2, *PROMPTS[2:]], **asked)
    assert first.tokens != second.tokens


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "fsdp": 1, "tensor": 2}], ids=str)
def test_a_model_over_a_mesh_answers_alike(model, axes):
    mesh = tj.mesh(**axes)
    placed = tj.parallel.place(model.params, mesh)
    module = model.module.clone(mesh=mesh)
    spread = dataclasses.replace(model, params=placed, module=module)
    expected = [answer.tokens for answer in tj.generate(model, PROMPTS[:3], max_new_tokens=9)]
    assert [a.tokens for a in tj.generate(spread, PROMPTS[:3], max_new_tokens=9)] == expected


def test_lengths_within_a_bucket_share_a_program(model, caplog):
    def compilations(length, max_new_tokens):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            tj.generate(model, [[70] * length] * 5, max_new_tokens=max_new_tokens)
        compiled = re.compile(r"Finished XLA compilation of jit\(_(prefill|decode)\)")
        return sum(bool(compiled.match(message)) for message in caplog.messages)

    assert compilations(5, 3) == 2
    assert compilations(60, 50) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[70], []]}, "prompt 1 is empty"),
        ({"prompts": "hello"}, "prompts is one text"),
        (
            {"prompts": [[70] * 500], "max_new_tokens": 13},
            "prompt 0 has 500 tokens; with max_new_tokens=13",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"sampler": sampler()}, "sampling needs a key"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_said(model, changes, message):
    with pytest.raises(ValueError, match=message):
        tj.generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2} | changes)


def test_a_text_and_messages_go_through_the_template_and_raw_text_does_not():
    def ask(*args, **options):
        return toy.tokenizer().decode(prompt_ids(toy.tokenizer(), *args, **options))

    assert ask("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "hi"}]
    assert ask(said).startswith("<|im_start|>system\na<|im_end|>\n<|im_start|>user\nhi")
    assert ask("hi", raw=True) == "hi"
    assert prompt_ids(toy.tokenizer(bos=True), "", raw=True) == [1]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "options", "message"),
    [
        (toy.tokenizer(None), "hi", {}, "has no chat template"),
        (toy.tokenizer(), [{"role": "robot", "content": "a"}], {}, "unknown role robot"),
        (toy.tokenizer(), "", {"raw": True}, "the prompt is empty"),
    ],
    ids=["template", "role", "empty"],
)
def test_a_prompt_that_cannot_be_encoded_is_refused(tokenizer, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        prompt_ids(tokenizer, prompt, **options)

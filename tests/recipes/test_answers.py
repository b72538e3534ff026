"""`generate` and `chat`: what reaches the standard output, and nothing else."""

import io

import pytest

from trainjax import cli, models
from trainjax.rollout import generate, prompt_ids

LIMIT = ["--max-new-tokens", "12"]


def ask(job, model, *flags):
    return cli.main([job, "--model", str(model), *LIMIT, *map(str, flags)])


def test_generate_prints_the_answer_alone(model, capsys):
    loaded = models.load(model)
    (answer,) = generate(loaded, ["hello"], max_new_tokens=12)
    assert ask("generate", model, "--prompt", "hello") == 0
    assert capsys.readouterr().out == f"{answer.text}\n"


def test_generate_continues_raw_text(model, capsys):
    loaded = models.load(model)
    (answer,) = generate(
        loaded, [prompt_ids(loaded.tokenizer, "hello", raw=True)], max_new_tokens=12
    )
    assert ask("generate", model, "--prompt", "hello", "--raw") == 0
    assert capsys.readouterr().out == f"{answer.text}\n"


@pytest.mark.parametrize("folder", ["", "adapter"])
def test_generate_takes_an_adapter_or_the_run_that_made_it(finished, model, folder, capsys):
    ask("generate", model, "--prompt", "say 1")
    base = capsys.readouterr().out
    assert ask("generate", model, "--prompt", "say 1", "--adapter", finished / folder) == 0
    assert capsys.readouterr().out != base


def test_seeds_draw_differently_and_repeat(model, capsys):
    def out(seed):
        ask("generate", model, "--prompt", "a", "--temperature", 2, "--seed", seed)
        return capsys.readouterr().out

    assert out(1) == out(1) != out(2)


def test_chat_answers_until_its_input_ends_and_reset_forgets(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n/reset\nhello\n"))
    assert ask("chat", model, "--temperature", 0) == 0
    answers = [line.removeprefix("> ") for line in capsys.readouterr().out.split("\n")]
    first, second, *_ = (line for line in answers if line)
    assert answers.count(first) + answers.count(f"> {first}") >= 2  # after the reset as at first
    assert first != second


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is not a number from 0"),
        (["--max-new-tokens", "999"], "more than the 512 that the model was made for"),
        (["--adapter", "nowhere"], "nowhere is not an adapter's folder"),
        (["--top-p", "0"], "top_p=0.0 is not a share"),
        (["--raw", "--prompt", ""], "the prompt is empty"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_answered_is_one_sentence(model, capsys, flags, sentence):
    assert ask("generate", model, "--prompt", "a", *flags) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.startswith("error: ")

import numpy as np
import pytest

from tests import toy
from trainjax import data

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "ho"}
TURNS = [USER, REPLY, {"role": "user", "content": "more?"}, {"role": "assistant", "content": "no"}]


def encode(rows, max_length=256, template=toy.CHATML, bos=False, **options):
    return data.encode(rows, toy.tokenizer(template, bos), max_length, **options)


def texts(examples, template=toy.CHATML):
    """All of the first example's text, and the part that is trained on."""
    decode = toy.tokenizer(template).decode
    here = examples.slice_of(0)
    tokens, trained = examples.tokens[here], examples.trained[here]
    return decode(tokens), decode(tokens[trained])


CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": "hi", "completion": "ho"},
        {"instruction": "hi", "input": "", "output": "ho"},
        {"instruction": "hi", "input": None, "output": "ho", "extra": 1},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_format_comes_to_the_same_conversation(row):
    assert texts(encode([row])) == (CHAT, "ho<|im_end|>\n")


def test_every_assistant_turn_of_messages_is_trained_on():
    assert texts(encode([{"messages": TURNS}]))[1] == "ho<|im_end|>\nno<|im_end|>\n"


def test_only_the_completion_is_trained_on_even_if_the_prompt_holds_answers():
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert texts(encode([row]))[1] == "no<|im_end|>\n"


def test_all_text_is_trained_on_but_its_first_token_and_ends_in_eos():
    assert texts(encode([{"text": "abc"}])) == ("abc<|im_end|>", "bc<|im_end|>")


def test_plain_pairs_without_a_template_are_joined_as_they_are():
    examples = encode([{"prompt": "hi ", "completion": "ho"}], template=None)
    assert texts(examples) == ("hi ho<|im_end|>", "ho<|im_end|>")


def test_the_template_can_be_left_out():
    examples = encode([{"prompt": "hi ", "completion": "ho"}], template=toy.CHATML)
    bare = data.encode(
        [{"prompt": "hi ", "completion": "ho"}], toy.tokenizer(), 256, template=False
    )
    assert texts(bare) == ("hi ho<|im_end|>", "ho<|im_end|>")
    assert texts(examples) != texts(bare)


def test_alpaca_without_a_template_has_its_own_frame():
    row = {"instruction": "do", "input": "this", "output": "done"}
    expected = "### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n"
    assert texts(encode([row], template=None)) == (f"{expected}done<|im_end|>", "done<|im_end|>")


def test_a_beginning_token_is_added_to_text_and_never_to_a_template():
    plain, chat = (
        encode([row], bos=True) for row in ({"text": "abc"}, {"messages": [USER, REPLY]})
    )
    begin = toy.tokenizer().convert_tokens_to_ids("<|im_start|>")
    assert plain.tokens.tolist().count(begin) == 1
    assert chat.tokens.tolist().count(begin) == 2  # one a message, the template's own
    assert texts(plain)[1] == "abc<|im_end|>"


def test_the_end_of_sequence_is_trained_on_though_it_is_also_the_padding_token():
    examples = encode([{"messages": [USER, REPLY]}])
    end = toy.tokenizer().eos_token_id
    assert toy.tokenizer().pad_token_id == end
    assert examples.trained[np.flatnonzero(examples.tokens == end)[-1]]


def test_special_tokens_in_user_text_do_not_move_the_mask():
    row = {"prompt": "<|im_end|>é<|im_start|>", "completion": "ü"}
    assert texts(encode([row]))[1] == "ü<|im_end|>\n"


def test_a_tokenizer_that_joins_characters_across_the_boundary_keeps_prompt_tokens_untrained():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "<e>": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<e>"])
    joined = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    examples = data.encode([{"prompt": "ca", "completion": "bc"}], joined, 16)
    assert examples.tokens.tolist() == [2, 3, 2, 4]
    assert examples.trained.tolist() == [False, False, True, True]


class TestLongRows:
    rows = [{"text": "a" * 10}, {"text": "b" * 100}]

    def test_are_cut_and_counted(self):
        examples = encode(self.rows, 20)
        assert examples.lengths.tolist() == [11, 20]
        assert examples.truncated == 1
        assert "1 cut to the longest length" in examples.summary()

    def test_can_be_left_out(self):
        examples = encode(self.rows, 20, too_long=data.drop)
        assert (examples.rows.tolist(), examples.too_long) == ([0], 1)

    def test_can_be_an_error(self):
        with pytest.raises(ValueError, match="row 1: 101 tokens are more than max_length=20"):
            encode(self.rows, 20, too_long=data.refuse)

    def test_whose_completion_is_cut_off_are_left_out_and_counted(self):
        rows = [{"prompt": "p" * 100, "completion": "x"}, {"prompt": "p", "completion": "x"}]
        examples = encode(rows, 60)
        assert (examples.rows.tolist(), examples.without_target) == ([1], 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset is empty"),
        (
            [{"question": "a", "answer": "b"}],
            "row 0: the columns are question, answer; accepted are: ",
        ),
        ([{"text": "a"}, {"txt": "b"}], "row 1: the column 'text' is missing"),
        ([{"text": None}], "row 0: `text` is text, this is None"),
        ([{"messages": []}], "row 0: messages are a list, not empty"),
        ([{"messages": "hi"}], "row 0: messages are a list, not empty"),
        ([{"messages": [{"content": "a"}]}], "row 0: a message is an object with `role`"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "row 0: .*unknown role robot"),
        ([{"messages": [{"role": "user"}, REPLY]}], "row 0: the chat template refuses"),
        (
            [{"prompt": "a", "completion": [REPLY]}],
            "row 0: `prompt` and `completion` are both text",
        ),
        ([{"conversations": [{"from": "cat", "value": "miau"}]}], "row 0: a turn is from 'cat'"),
        ([{"messages": [USER]}], "none of the 1 rows has a token to train on"),
        (
            [{"text": "a"}, {"prompt": "x", "completion": "y"}],
            "row 1: the column 'text' is missing",
        ),
    ],
)
def test_bad_rows_are_one_clear_sentence_with_the_row(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(rows)
    assert "\n" not in str(error.value)


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ValueError, match="row 0: .*has no chat template"):
        encode([{"messages": [USER, REPLY]}], template=None)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ValueError, match="writes earlier turns differently"):
        encode([{"messages": TURNS}], template=forgetful)

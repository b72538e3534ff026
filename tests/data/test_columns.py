"""Columns that other tools' data have beside the text: none that says something is passed over."""

import pytest

from tests import toy
from trainjax import data

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
TALKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
ROWS = {
    "messages": {"messages": TALK},
    "prompt": {"prompt": "hi", "completion": "yes"},
    "alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    },
}


def texts(row, read=None):
    """The texts of a row, and what of each is trained on."""
    tokenizer = toy.tokenizer()
    made = (
        data.encode([row], tokenizer, 512)
        if read is None
        else data.encode_groups([row], tokenizer, 512, read=read, share_prompt=False)
    )
    trained = made.trained if made.groups is None else made.groups.targets
    return tokenizer.decode(made.tokens), tokenizer.decode(made.tokens[trained])


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_column_of_system_is_the_first_message_and_is_not_trained(row, name):
    assert texts(row | {name: "Be brief."}) == (SYSTEM + TALKED, "yes<|im_end|>\n")
    assert texts(row | {name: ""}) == texts(row) == (TALKED, "yes<|im_end|>\n")


def test_completions_that_are_compared_come_after_it_too():
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no", "system": "Be brief."}
    text, trained = texts(pair, data.pair)
    assert text == SYSTEM + TALKED + SYSTEM + TALKED.replace("yes", "no")
    assert trained == "yes<|im_end|>\nno<|im_end|>\n"


def test_without_a_template_it_stands_before_the_prompt():
    row = ROWS["prompt"] | {"system": "Be brief."}
    made = data.encode([row], toy.tokenizer(), 512, template=False)
    assert toy.tokenizer().decode(made.tokens) == "Be brief.\n\nhiyes<|im_end|>"


def test_a_system_message_that_says_another_thing_is_refused_by_its_row():
    row = {"messages": [{"role": "system", "content": "Be long."}, *TALK], "system": "Be brief."}
    with pytest.raises(
        ValueError, match=r"row 0: the column `system` says 'Be brief.' and the first"
    ):
        texts(row)
    same = {"messages": [{"role": "system", "content": "Be brief."}, *TALK], "system": "Be brief."}
    assert texts(same)[0] == SYSTEM + TALKED


def test_a_history_comes_before_and_its_answers_are_trained():
    row = ROWS["alpaca"] | {"history": [["one", "two"]]}
    text, trained = texts(row)
    assert text == TALKED.replace("hi", "one").replace("yes", "two") + TALKED
    assert trained == "two<|im_end|>\nyes<|im_end|>\n"
    with pytest.raises(ValueError, match="row 0: `history` is a list of pairs.*this is 'one'"):
        texts(ROWS["alpaca"] | {"history": "one"})


def test_functions_and_their_calls_are_tools_by_an_older_name():
    call = {"name": "clock", "arguments": '{"place": "Bern"}'}
    read = data.formats.supervised_reader(["messages"])
    asked = {"role": "assistant", "content": None, "function_call": call}
    told = {"role": "function", "name": "clock", "content": "10:15"}
    made = read({"messages": [TALK[0], asked, told, TALK[1]], "functions": [{"name": "clock"}]})
    assert made.tools == [{"type": "function", "function": {"name": "clock"}}]
    assert made.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "clock", "arguments": {"place": "Bern"}}}
    ]
    assert made.messages[2]["role"] == "tool"

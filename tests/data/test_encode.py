import json

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


def joining(merges, bos=False):
    """A tokenizer that joins some neighbours, and may begin each text with a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [*"abc:Ċ", "Ġ"]
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, merges), "<e>", "<s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<e>", "<s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("ca", "bc", ["c", "a", "b", "c"]),  # the tokenizer would join a and b
        ("c: ", "a", ["c", ":", "Ġ", "a"]),  # a prompt that ends in a space
        ("c:", " a", ["c", ":", "Ġa"]),
        ("", "ab", ["ab"]),
    ],
)
def test_a_prompt_is_tokenized_as_generation_will_and_all_of_the_completion_is_trained(
    prompt, completion, tokens
):
    tokenizer = joining([("a", "b"), ("Ġ", "a")])
    examples = data.encode([{"prompt": "c" + prompt, "completion": completion}], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(examples.tokens) == ["c", *tokens, "<e>"]
    asked = tokenizer.backend_tokenizer.encode("c" + prompt).ids
    assert examples.tokens[: len(asked)].tolist() == asked
    assert examples.trained.tolist() == [i >= len(asked) for i in range(len(examples.tokens))]


def test_a_text_that_begins_as_the_tokenizer_would_begin_it_begins_once():
    tokenizer = joining([], bos=True)
    for text in ("ab", "<s>ab", "<s>ab<e>"):
        examples = data.encode([{"text": text}], tokenizer, 16)
        assert tokenizer.decode(examples.tokens) == "<s>ab<e>"
        assert examples.trained.tolist() == [False, True, True, True]


def test_a_prompt_that_is_cut_into_pieces_begins_with_the_tokenizers_own_token_and_ends_once():
    tokenizer = joining([("a", "b")], bos=True)
    examples = data.encode([{"prompt": "ca", "completion": "b"}], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(examples.tokens) == ["<s>", "c", "a", "b", "<e>"]
    assert examples.trained.tolist() == [False, False, False, True, True]


def test_a_piece_inside_a_text_gets_no_space_of_its_own():
    """SentencePiece's tokenizers put a space before what begins a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"▁": 0, "a": 1, "b": 2, "▁b": 3, "\n": 4, "</s>": 5, ":": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    examples = data.encode([{"prompt": "a: ", "completion": "b"}], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(examples.tokens) == ["▁", "a", ":", "▁", "b", "</s>"]
    assert examples.trained.tolist() == [False] * 4 + [True] * 2


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
            [{"prompt": "a", "completion": 4}],
            "row 0: `completion` is text or messages, this is 4",
        ),
        ([{"conversations": [{"from": "cat", "value": "miau"}]}], "row 0: a turn is from 'cat'"),
        (
            [{"messages": [REPLY | {"weight": 0.5}]}],
            "row 0: `weight` of a message is 0, 1, true or",
        ),
        (
            [{"messages": [REPLY | {"train": "no"}]}],
            "row 0: `train` of a message is .*this is 'no'",
        ),
        ([{"messages": [REPLY | {"content": 4}]}], "row 0: the `content` of a message is text"),
        (
            [{"messages": [REPLY | {"content": [{"type": "image"}]}]}],
            "row 0: a part of a content is text, .*this is {'type': 'image'}",
        ),
        (
            [{"messages": [REPLY], "tools": "clock"}],
            "row 0: `tools` is text, but not JSON: 'clock'",
        ),
        ([{"messages": [REPLY], "tools": 3}], "row 0: `tools` is a list, or JSON text of one"),
        ([{"messages": [REPLY | {"tool_calls": ["x"]}]}], "row 0: a tool call is an object"),
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


def test_a_template_that_forgets_what_is_answered_is_refused():
    forgetful = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    message = "row 0: the chat template leaves message 2 out once message 3 answers it"
    with pytest.raises(ValueError, match=message):
        encode([{"messages": TURNS}], template=forgetful)


@pytest.mark.parametrize(
    "columns", [["chosen", "rejected"], ["conversations", "chosen", "rejected"]]
)
def test_rows_of_pairs_are_sent_to_the_job_that_takes_them(columns):
    row = {column: [USER, REPLY] for column in columns}
    with pytest.raises(ValueError, match="row 0: .* rows of pairs are for `trainjax dpo`"):
        encode([row])
    assert texts(encode([row | {"messages": [USER, REPLY]}]))[1] == "ho<|im_end|>\n"


class TestCompletionsOfMessages:
    agent = (
        *({"role": "assistant", "content": "calling"}, {"role": "user", "content": "7"}),
        {"role": "assistant", "content": "seven"},
    )

    def test_of_which_the_assistants_alone_are_trained_and_none_of_the_prompts(self):
        examples = encode([{"prompt": TURNS[:3], "completion": list(self.agent)}])
        assert texts(examples)[1] == "calling<|im_end|>\nseven<|im_end|>\n"

    @pytest.mark.parametrize(
        "row", [{"prompt": "hi", "completion": [REPLY]}, {"prompt": [USER], "completion": "ho"}]
    )
    def test_may_stand_beside_text(self, row):
        assert texts(encode([row])) == (CHAT, "ho<|im_end|>\n")


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"weight": 0, "train": True}])
def test_a_message_that_is_switched_off_is_not_trained(off):
    turns = [USER, REPLY | off, *TURNS[2:]]
    assert texts(encode([{"messages": turns}]))[1] == "no<|im_end|>\n"
    turns[1] = REPLY | dict.fromkeys(off, None)  # as Parquet fills up what a row has not
    assert texts(encode([{"messages": turns}]))[1] == "ho<|im_end|>\nno<|im_end|>\n"


def test_a_sharegpt_turn_may_be_switched_off():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": 0}]
    turns += [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]
    assert texts(encode([{"conversations": turns}]))[1] == "no<|im_end|>\n"


PARTS_ALONE = toy.CHATML.replace(
    "message['content']", "message['content'] | map(attribute='text') | join"
)


@pytest.mark.parametrize("template", [toy.CHATML, PARTS_ALONE], ids=["text", "parts"])
@pytest.mark.parametrize("content", ["ho", [{"type": "text", "text": "h"}, {"text": "o"}]])
def test_contents_in_parts_and_as_text_come_to_the_same(template, content):
    examples = encode([{"messages": [USER, REPLY | {"content": content}]}], template=template)
    assert texts(examples) == (CHAT, "ho<|im_end|>\n")


class TestTools:
    tools = ({"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},)
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )

    def row(self, arguments, tools):
        call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": tools}

    @pytest.mark.parametrize("arguments", [{"town": "Bern"}, '{"town": "Bern"}'])
    @pytest.mark.parametrize("as_text", [False, True])
    def test_may_be_json_text_and_so_may_arguments(self, arguments, as_text):
        tools = json.dumps(self.tools) if as_text else list(self.tools)
        examples = encode([self.row(arguments, tools)], template=self.template)
        text, trained = texts(examples)
        assert text.startswith("clock;<|im_start|>user:hi")
        assert trained == '{"town": "Bern"}<|im_end|>'
        assert "template" not in examples.summary()

    @pytest.mark.parametrize(
        "written", ["{{ call.function.arguments }}", "{{ '' + call.function.arguments }}"]
    )
    def test_have_their_arguments_as_json_where_a_template_takes_text(self, written):
        template = self.template.replace("{{ call.function.arguments | tojson }}", written)
        examples = encode([self.row({"town": "Bern"}, None)], template=template)
        assert texts(examples)[1] == '{"town": "Bern"}<|im_end|>'

    def test_that_the_template_does_not_know_are_counted_and_no_empty_answer_is_trained(self):
        answered = [{"role": "user", "content": "10:15"}, REPLY]
        row = self.row({"town": "Bern"}, list(self.tools))
        row["messages"] += answered
        examples = encode([row])
        assert texts(examples)[1] == "ho<|im_end|>\n"
        assert (examples.unwritten, examples.tools_ignored) == (1, 1)
        assert "1 not trained on: answers that the chat template does not write" in (
            examples.summary()
        )


THOUGHTFUL = (  # opens a thought, and leaves thoughts out of what it writes
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content }}{% else %}"
    "[A]{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
KEEPS_LAST = (  # writes the thoughts of the last turn alone
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content }}{% else %}"
    "[A]{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)


class TestThoughts:
    turns = [USER, {"role": "assistant", "content": "<think>hm</think>ho"}]
    turns += [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>o</think>no"},
    ]

    def test_that_the_template_leaves_out_are_not_trained(self):
        examples = encode([{"messages": self.turns}], template=THOUGHTFUL)
        assert texts(examples) == (
            "[Q]hi[A]ho<|im_end|>[Q]?[A]no<|im_end|>",
            "ho<|im_end|>no<|im_end|>",
        )

    def test_that_later_turns_would_lose_are_trained_in_a_text_of_their_own(self):
        examples = encode([{"messages": self.turns}, {"messages": self.turns}], template=KEEPS_LAST)
        decode = toy.tokenizer().decode
        here = [examples.slice_of(i) for i in range(4)]
        assert examples.rows.tolist() == [0, 0, 1, 1]
        assert [decode(examples.tokens[s]) for s in here[:2]] == [
            "[Q]hi[A]<think>hm</think>ho<|im_end|>",
            "[Q]hi[A]ho<|im_end|>[Q]?[A]<think>o</think>no<|im_end|>",
        ]
        assert [decode(examples.tokens[s][examples.trained[s]]) for s in here[:2]] == [
            "<think>hm</think>ho<|im_end|>",
            "<think>o</think>no<|im_end|>",
        ]

    def test_make_a_completion_of_several_answers_several_texts_which_a_pair_cannot_be(self):
        row = {"prompt": [USER], "chosen": self.turns[1:], "rejected": [REPLY]}
        message = "row 0: the chat template writes earlier answers differently once later messages"
        with pytest.raises(ValueError, match=message):
            data.encode_groups([row], toy.tokenizer(KEEPS_LAST), 256)


def test_a_conversation_that_the_assistant_begins_is_trained_from_its_first_word():
    trims = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    greeting = [{"role": "system", "content": "Say ho."}, REPLY | {"content": " ho \n"}]
    for turns in ([*greeting, *TURNS[2:]], [greeting[1], *TURNS[2:]]):
        assert texts(encode([{"messages": turns}], template=trims))[1] == "ho<|im_end|>no<|im_end|>"

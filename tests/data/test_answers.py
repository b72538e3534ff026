"""What is trained is what the row says, whatever the chat template does with it.

Conversations are drawn by hypothesis; the expected text of an answer comes from `families`, which says in
Python what each template makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jaxtyping import config

from tests.data.families import FAMILIES, Family, split, tokenizer
from trainjax import data
from trainjax.data import answers

LONG = 10**6
# Words that a search would find elsewhere, that templates trim or cut, and that tokens join.
WORDS = (
    *(
        "ok",
        "a",
        "user",
        "assistant",
        "o",
        "Falcon",
        "\n",
        "\n\n",
        " ",
        ": ",
        "é",
        "日本",
        "0",
        "<",
    ),
    *(
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n\n",
        "<|im_end|>",
        "[/INST]",
        "### Response:\n",
    ),
)
SHAPES = (  # most are short: a turn more is two renderings more, of each template
    *("ua", "ua", "ua", "ua", "ua", "ua", "sua", "sua", "uau", "au", "a", "aua", "uua", "suau"),
    *("uaua", "uaua", "suaua", "uaau", "saua", "uuaua", "uaaua", "uauaua", "suauau"),
)
ROLES = {"s": "system", "u": "user", "a": "assistant"}

contents = st.lists(st.sampled_from(WORDS), max_size=3).map("".join) | st.text(
    st.characters(exclude_characters="\0", codec="utf-8"), max_size=6
)


def conversation(shape: str, texts: Sequence[str], off: int) -> list[dict[str, Any]]:
    """Messages; bit i of `off` says that message i is not to be trained on."""
    made = []
    for i, (role, text) in enumerate(zip(shape, texts, strict=False)):
        weight = {"weight": 0} if role == "a" and off >> i & 1 else {}
        made.append({"role": ROLES[role], "content": text, **weight})
    return made


conversations = st.builds(
    conversation,
    st.sampled_from(SHAPES),
    st.lists(contents, min_size=7, max_size=7),
    st.sampled_from([0, 0, 0, 1, 2, 8, 10]),
)
draws = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def refuses(family: Family, messages: list[dict[str, Any]]) -> bool:
    """Whether the family's template takes no such turns."""
    roles = [message["role"] for message in messages]
    if roles[0] == "system":
        if not family.system:
            return True
        roles = roles[1:]
    alternating = [("user", "assistant")[i % 2] for i in range(len(roles))]
    return family.strict and roles != alternating


def said(family: Family, messages: list[dict[str, Any]], turn: int) -> str:
    """What is to be trained of an answer: what the model has to write after the prompt of generation.

    Nothing is asked before the first message of all, which is trained from where its words begin.
    """
    content, final = messages[turn]["content"], turn == len(messages) - 1
    text = family.said(content, final)
    before = messages[turn - 1] if turn else None
    asked = before and not (
        family.uneven and before["role"] == "assistant" and not split(before["content"])[0]
    )
    start = answers.shared_length(text, family.said("\uf8ff", final))
    trained = text.removeprefix(family.opens) if asked else text[start:]
    silent = content.strip() not in trained and text == family.said("", final)
    return "" if silent else trained


def expected(family: Family, messages: list[dict[str, Any]], prompt: int) -> list[str]:
    """Each piece of text that is to be trained on, sorted."""
    answers = [
        said(family, messages, turn)
        for turn, message in enumerate(messages)
        if turn >= prompt and message["role"] == "assistant" and message.get("weight") != 0
    ]
    return sorted(piece for answer in answers for piece in answer.split("\0") if piece)


def trained_texts(examples: data.Examples, family: Family, count: int) -> list[list[str]]:
    """Each piece of text that is trained on, sorted, of each row."""
    found: list[list[str]] = [[] for _ in range(count)]
    decode = tokenizer(family).decode
    for example, number in enumerate(examples.rows):
        here = examples.slice_of(example)
        tokens, trained = examples.tokens[here], examples.trained[here]
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
        found[number] += [decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]
    return [sorted(pieces) for pieces in found]


def mistakes(family: Family, drawn: Sequence[list[dict[str, Any]]]) -> list[Any]:
    """Every conversation whose trained text is another than the assistant's words."""
    rows, wanted = [], []
    for i, messages in enumerate([ANSWERED, *drawn]):
        prompt = i % 3 and i % len(messages)  # in two of three the beginning is a prompt
        row = {"prompt": messages[:prompt], "completion": messages[prompt:]}
        if refuses(family, messages):
            with pytest.raises(ValueError, match="row 0: the chat template refuses"):
                data.encode([row], tokenizer(family), LONG)
        else:
            rows.append(row)
            wanted.append(expected(family, messages, prompt))
    found = trained_texts(data.encode(rows, tokenizer(family), LONG), family, len(rows))
    return [case for case in zip(rows, found, wanted, strict=True) if case[1] != case[2]]


ANSWERED = [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "ok"}]


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Without types checked at run time, which the other tests check: twice as fast."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


batches = st.lists(conversations, min_size=20, max_size=20)


@settings(draws, max_examples=5)
@given(batches)
def test_the_assistants_words_and_ends_of_turn_are_trained_and_nothing_else(drawn):
    for name, family in FAMILIES.items():
        assert (name, mistakes(family, drawn)[:1]) == (name, [])


@pytest.mark.slow
@draws
@given(batches)
def test_of_two_thousand_conversations_nothing_else_is_trained(drawn):
    for name, family in FAMILIES.items():
        assert (name, mistakes(family, drawn)[:1]) == (name, [])


def compared_texts(examples: data.Examples, family: Family) -> dict[int, list[str]]:
    """The text that is a target, of each completion of each row."""
    found, groups, decode = {}, examples.groups, tokenizer(family).decode
    assert groups is not None
    for example, number in enumerate(examples.rows.tolist()):
        here = examples.slice_of(example)
        kept = groups.branches[here] * groups.targets[here]
        found[number] = [decode(examples.tokens[here][kept == k + 1]) for k in range(groups.size)]
    return found


KINDS = {
    "pair": lambda prompt, a, b: {"prompt": prompt, "chosen": [a], "rejected": [b]},
    "conversations": lambda prompt, a, b: {"chosen": [*prompt, a], "rejected": [*prompt, b]},
    "scored": lambda prompt, a, b: {
        "prompt": prompt,
        "completions": [[a], [b]],
        "scores": [1.0, 0.0],
    },
    "labelled": lambda prompt, a, b: {"prompt": prompt, "completion": [a], "label": True},
}


def compared_mistakes(family: Family, drawn: Sequence[tuple[Any, str]], kind: str) -> list[Any]:
    """Every row whose completions have other targets than the assistant's words."""
    asked = [
        (messages[:-1], {**messages[-1], "weight": 1}, {"role": "assistant", "content": other})
        for messages, other in [(ANSWERED, "no"), *drawn]
        if messages[-1]["role"] == "assistant" and not refuses(family, messages)
    ]
    rows = [KINDS[kind](*case) for case in asked]
    if kind == "labelled":  # the second completion is the next row's that says something
        others = [(*asked[i + 1 :], *asked) for i in range(len(asked))]
        says = [next(a for _, a, _ in other if a["content"].strip()) for other in others]
        asked = [(prompt, a, b) for (prompt, a, _), b in zip(asked, says, strict=True)]
    wanted = {}
    for number, (prompt, a, b) in enumerate(asked):
        texts = [said(family, [*prompt, one], len(prompt)).replace("\0", "") for one in (a, b)]
        empty = [not one["content"].strip() for one in (a, b)]
        equal = kind in ("pair", "conversations") and a["content"] == b["content"]
        if all(texts) and not any(empty) and not equal:
            wanted[number] = texts
    found = compared_texts(data.encode_groups(rows, tokenizer(family), LONG), family)
    return [
        (rows[i], found.get(i), wanted.get(i))
        for i in range(len(rows))
        if found.get(i) != wanted.get(i)
    ]


@settings(draws, max_examples=2)
@given(st.lists(st.tuples(conversations, contents), min_size=20, max_size=20))
def test_pairs_labels_and_lists_compare_the_words_of_their_completions_and_nothing_else(drawn):
    for name, family in FAMILIES.items():
        for kind in KINDS:
            assert (name, compared_mistakes(family, drawn, kind)[:1]) == (name, [])


def test_a_search_for_the_words_would_not_do(monkeypatch):
    """That the check above sees what goes wrong: the words stand elsewhere, or are trimmed."""
    drawn = [
        conversation(shape, ("ok", " ok\n", "a", "user", "ok"), 0) for shape in ("uaua", "suaua")
    ]

    def first_place(write, messages, turn, text):
        return max(0, text.find(messages[turn]["content"]))

    assert not any(mistakes(family, drawn) for family in FAMILIES.values())
    monkeypatch.setattr(answers, "answer_start", first_place)
    tagged = {"smollm3", "tagged-thoughts"}
    assert all(mistakes(family, drawn) for name, family in FAMILIES.items() if name not in tagged)

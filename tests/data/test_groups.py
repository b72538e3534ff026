"""Several completions of a prompt: what is shared, what is a target, what is refused."""

import itertools

import numpy as np
import pytest

from tests import toy
from trainjax import data

PAIRS = [
    {"prompt": f"say {i}", "chosen": f"{i}" * (1 + i % 3), "rejected": f"no {i}"} for i in range(9)
]
MESSAGES = (
    {"role": "user", "content": "say 0"},
    *({"role": "assistant", "content": text} for text in ("0", "no 0")),
)
SAME = {
    "text": {"prompt": "say 0", "chosen": "0", "rejected": "no 0"},
    "messages": {
        "prompt": [MESSAGES[0]],
        "chosen": [MESSAGES[1]],
        "rejected": [MESSAGES[2]],
    },
    "no prompt": {"chosen": [MESSAGES[0], MESSAGES[1]], "rejected": [MESSAGES[0], MESSAGES[2]]},
    "ultrafeedback": {
        "prompt": "say 0",
        "chosen": [MESSAGES[0], MESSAGES[1]],
        "rejected": [MESSAGES[0], MESSAGES[2]],
    },
    "prompt in all three": {
        "prompt": [MESSAGES[0]],
        "chosen": [MESSAGES[0], MESSAGES[1]],
        "rejected": [MESSAGES[0], MESSAGES[2]],
    },
    "text before messages": {"prompt": "say 0", "chosen": [MESSAGES[1]], "rejected": [MESSAGES[2]]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "say 0"}],
        "chosen": {"from": "gpt", "value": "0"},
        "rejected": {"from": "gpt", "value": "no 0"},
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: say 0\n\nAssistant: 0",
        "rejected": "\n\nHuman: say 0\n\nAssistant: no 0",
    },
    "scores": {"prompt": "say 0", "completions": ["0", "no 0"], "scores": [1.0, 0.5]},
}


def plain(examples: data.Examples, example: int) -> list[tuple[list[int], list[int]]]:
    """Each completion's whole text as ids, and its targets."""
    here = examples.slice_of(example)
    tokens, branches = examples.tokens[here], examples.groups.branches[here]
    targets = examples.groups.targets[here]
    return [
        (
            [*tokens[branches == 0].tolist(), *tokens[branches == k].tolist()],
            tokens[(branches == k) & targets].tolist(),
        )
        for k in range(1, examples.groups.size + 1)
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_a_completion_is_what_supervised_encoding_makes_of_it(row, share):
    found = plain(data.encode_groups([row], toy.tokenizer(), 128, share_prompt=share), 0)
    for (ids, targets), answer in zip(found, ("0", "no 0"), strict=True):
        alone = data.encode([{"prompt": "say 0", "completion": answer}], toy.tokenizer(), 128)
        assert ids == alone.tokens.tolist()
        assert targets == alone.tokens[alone.trained].tolist()


def test_a_shared_prompt_is_there_once_but_for_its_last_token():
    row = SAME["text"]
    shared, apart = (
        data.encode_groups([row], toy.tokenizer(), 128, share_prompt=share)
        for share in (True, False)
    )
    prompt = (
        len(
            data.encode(
                [
                    {
                        "text": toy.tokenizer().apply_chat_template(
                            [MESSAGES[0]], tokenize=False, add_generation_prompt=True
                        )
                    }
                ],
                toy.tokenizer(),
                128,
            ).tokens
        )
        - 1
    )
    assert (shared.groups.branches == 0).sum() == prompt - 1
    assert len(apart.tokens) - len(shared.tokens) == prompt - 1
    assert not apart.groups.shares_prompts


@pytest.mark.parametrize("pack", [data.unpacked, data.best_fit])
@pytest.mark.parametrize("share", [True, False])
def test_a_batch_says_which_completion_each_target_is_of(pack, share):
    examples = data.encode_groups(PAIRS, toy.tokenizer(), 64, share_prompt=share)
    plan = data.Plan(4, 256, pack, seed=0)
    seen = []
    for planned in plan.epoch(examples, 0):
        batch = data.fill(examples, plan, planned)
        assert batch["groups"].sum() == pytest.approx(1.0, abs=1e-6)
        for row, members in enumerate(planned.rows):
            for slot, example in enumerate(members):
                assert batch["groups"][row, slot] > 0
                ours = [
                    batch["tokens"][row][batch["completions"][row] == 2 * slot + 1 + k].tolist()
                    for k in range(2)
                ]
                assert ours == [targets for _, targets in plain(examples, example)]
                seen.append(examples.rows[example])
    assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("pack", [data.unpacked, data.best_fit])
def test_a_completion_sees_the_prompt_and_goes_on_where_it_ends(pack):
    """Followed from any target back through what it sees, positions are 0, 1, 2, ..."""
    examples = data.encode_groups(PAIRS, toy.tokenizer(), 64)
    plan = data.Plan(4, 256, pack, seed=0)
    batch = data.fill(examples, plan, plan.epoch(examples, 0)[0])
    for row, segment in itertools.product(range(4), np.unique(batch["segments"])):
        own = batch["segments"][row] == segment
        if not segment or not own.any():
            continue
        (prefix,) = np.unique(batch["prefixes"][row][own])
        text = own | ((batch["segments"][row] == prefix) & (prefix > 0))
        np.testing.assert_array_equal(batch["positions"][row][text], np.arange(text.sum()))


def test_supervised_weights_are_on_the_best_completion_alone():
    examples = data.encode_groups(PAIRS, toy.tokenizer(), 64)
    plan = data.Plan(4, 256, data.best_fit)
    batch = data.fill(examples, plan, plan.epoch(examples, 0)[0])
    np.testing.assert_array_equal(batch["weights"] > 0, batch["completions"] % 2 == 1)
    assert batch["weights"].sum() == pytest.approx(1.0, abs=1e-6)


def test_a_labelled_completion_has_another_rows_beside_it():
    rows = [
        {"prompt": f"say {i}", "completion": f"{i}", "label": label}
        for i, label in enumerate([True, False, True])
    ]
    examples = data.encode_groups(rows, toy.tokenizer(), 64)
    text = toy.tokenizer().decode
    texts = [[text(t) for _, t in plain(examples, i)] for i in range(3)]
    assert [[t[0] for t in pair] for pair in texts] == [["0", "1"], ["1", "2"], ["2", "0"]]
    assert examples.groups.values["labels"].tolist() == [1.0, 0.0, 1.0]
    assert [bool(examples.trained[examples.slice_of(i)].any()) for i in range(3)] == [
        True,
        False,
        True,
    ]


def test_scored_lists_of_several_lengths_are_filled_up():
    rows = [
        {"prompt": "a", "completions": ["x", "y"], "scores": [0.0, 2.0]},
        {"prompt": "b", "completions": ["x", "y", "z"], "scores": [1, 0, 0]},
    ]
    examples = data.encode_groups(rows, toy.tokenizer(), 64)
    assert examples.groups.size == 3
    assert examples.groups.values["scores"].tolist() == [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]


def test_margins_of_pairs_reach_the_batch():
    rows = [row | {"margin": i / 2} for i, row in enumerate(PAIRS)]
    examples = data.encode_groups(rows, toy.tokenizer(), 64)
    plan = data.Plan(9, 128, data.unpacked, seed=None)
    batch = data.fill(examples, plan, plan.epoch(examples, 0)[0])
    assert batch["margins"][:, 0].tolist() == [i / 2 for i in range(9)]
    without = data.encode_groups(PAIRS, toy.tokenizer(), 64)
    assert "margins" not in data.fill(without, plan, plan.epoch(without, 0)[0])


def test_numbers_that_only_some_rows_have_are_refused():
    rows = [PAIRS[0], PAIRS[1] | {"margin": 1.0}]
    for given, sentence in (
        (rows, "row 0 comes with no numbers, row 1 with margins; give them in all rows or in none"),
        (rows[::-1], "row 0 comes with margins, row 1 with none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            data.encode_groups(given, toy.tokenizer(), 64)


SINGLE = {
    "prompt": {"prompt": "say 0", "completion": "0"},
    "prompt as messages": {"prompt": [MESSAGES[0]], "completion": [MESSAGES[1]]},
    "messages": {"messages": [MESSAGES[0], MESSAGES[1]]},
    "text": {"text": "say 0"},
}


@pytest.mark.parametrize("row", SINGLE.values(), ids=SINGLE)
def test_a_single_text_is_a_group_of_one_as_supervised_encoding_makes_it(row):
    found = data.encode_groups([row], toy.tokenizer(), 128, read=data.single)
    alone = data.encode([row], toy.tokenizer(), 128)
    assert found.groups.size == 1
    assert plain(found, 0) == [(alone.tokens.tolist(), alone.tokens[alone.trained].tolist())]


def test_a_single_text_that_is_empty_or_of_no_format_is_refused():
    for row, sentence in (
        ({"prompt": "a", "completion": " "}, "row 0: a completion is empty: ' '"),
        ({"question": "a"}, "row 0: the columns are question; accepted are: messages; prompt"),
    ):
        with pytest.raises(ValueError, match=sentence):
            data.encode_groups([row], toy.tokenizer(), 64, read=data.single)


def test_the_epochs_batches_weigh_all_groups_alike():
    examples = data.encode_groups(PAIRS, toy.tokenizer(), 64)
    plan = data.Plan(4, 128, data.unpacked)
    groups = [np.asarray(batch["groups"]) for batch in data.one_epoch(examples, plan)]
    assert sorted(np.concatenate(groups).ravel()[:9].tolist(), reverse=True)[0] == pytest.approx(
        1 / 9
    )
    assert sum(g.sum() for g in groups) == pytest.approx(1.0, abs=1e-6)


def test_the_fingerprint_tells_which_completion_is_the_better():
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    first, second = (
        data.encode_groups(r, toy.tokenizer(), 64).fingerprint() for r in (PAIRS, swapped)
    )
    assert first != second


BAD = {
    "the columns are prompt, chosen; accepted are: chosen \\+ rejected": {
        "prompt": "a",
        "chosen": "x",
    },
    "row 0: `margin` is a finite number, this is 'much'": {
        "prompt": "a",
        "chosen": "x",
        "rejected": "y",
        "margin": "much",
    },
    "row 0: `scores` are finite numbers, these are \\[nan, 1.0\\]": {
        "prompt": "a",
        "completions": ["x", "y"],
        "scores": [float("nan"), 1.0],
    },
    "row 0: 2 `completions` with 1 `scores`": {
        "prompt": "a",
        "completions": ["x", "y"],
        "scores": [1.0],
    },
    "row 0: `label` is true or false, this is 'maybe'": {
        "prompt": "a",
        "completion": "x",
        "label": "maybe",
    },
    "row 0: a completion is text or messages, this is 4": {
        "prompt": "a",
        "chosen": 4,
        "rejected": "y",
    },
    "without `prompt` are lists of messages, or texts that begin alike": {
        "chosen": "a b",
        "rejected": "a c",
    },
    "row 0: `prompt` is 'say 1', but `chosen` and `rejected` are conversations": {
        "prompt": "say 1",
        "chosen": [MESSAGES[0], MESSAGES[1]],
        "rejected": [MESSAGES[0], MESSAGES[2]],
    },
    "row 0: `chosen` and `rejected` are both text or both lists": {
        "chosen": "a",
        "rejected": [MESSAGES[1]],
    },
}


@pytest.mark.parametrize(("message", "row"), BAD.items(), ids=range(len(BAD)))
def test_bad_rows_are_one_clear_sentence(message, row):
    with pytest.raises(ValueError, match=message):
        data.encode_groups([row], toy.tokenizer(), 64)


def test_rows_with_nothing_to_compare_are_left_out_and_counted():
    empty, same = PAIRS[0] | {"rejected": " "}, PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}
    silent = {"prompt": [MESSAGES[0]], "chosen": [MESSAGES[1]], "rejected": []}
    null = {"chosen": [MESSAGES[0], MESSAGES[1]], "rejected": None}
    examples = data.encode_groups([empty, *PAIRS, same, silent, null], toy.tokenizer(), 100)
    assert (examples.rows.tolist(), examples.incomparable) == ([*range(1, 10)], 4)
    assert "4 left out: completions that are equal, or an empty one" in examples.summary()
    with pytest.raises(
        ValueError, match="none of the 1 rows can be compared: its completions are equal"
    ):
        data.encode_groups([same], toy.tokenizer(), 100)


def test_an_empty_completion_is_nobodys_baseline():
    rows = [{"prompt": "a", "completion": text, "label": True} for text in ("x", " ", "y")]
    examples = data.encode_groups(rows, toy.tokenizer(), 64)
    text = toy.tokenizer().decode
    beside = [[text(targets)[0] for _, targets in plain(examples, i)] for i in range(2)]
    assert (beside, examples.incomparable) == ([["x", "y"], ["y", "x"]], 1)


def test_assistant_turns_of_the_prompt_are_no_targets_and_all_of_the_completion_are():
    prompt = [MESSAGES[0], MESSAGES[1], MESSAGES[0]]
    answers = [[a, {"role": "user", "content": "7"}, b] for a, b in (MESSAGES[1:], MESSAGES[:0:-1])]
    rows = {
        "pair": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        "labelled": {"prompt": prompt, "completion": answers[0], "label": True},
        "scored": {"prompt": prompt, "completions": answers, "scores": [1.0, 0.0]},
    }
    for row in rows.values():
        found = plain(data.encode_groups([row], toy.tokenizer(), 512), 0)
        text = [toy.tokenizer().decode(targets) for _, targets in found]
        assert text[0] == "0<|im_end|>\nno 0<|im_end|>\n"
        assert text[-1] in (text[0], "no 0<|im_end|>\n0<|im_end|>\n")


def test_plain_texts_of_several_turns_are_the_messages_that_their_markers_part():
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{before} yes", "rejected": f"{before} you\n\nHuman: d"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns += [{"role": "user", "content": "c"}]
    same = {"prompt": turns, "chosen": "yes", "rejected": "you\n\nHuman: d"}
    framed, messages = (data.encode_groups([r], toy.tokenizer(), 256) for r in (row, same))
    assert plain(framed, 0) == plain(messages, 0)
    bare = data.encode_groups([row], toy.tokenizer(), 256, template=False)
    (ids, targets), _ = plain(bare, 0)
    decode = toy.tokenizer().decode
    assert (decode(ids), decode(targets)) == (f"{before} yes<|im_end|>", " yes<|im_end|>")


def test_completions_beyond_the_longest_length_are_left_out_and_counted():
    rows = [*PAIRS, {"prompt": "p" * 200, "chosen": "x", "rejected": "y"}]
    examples = data.encode_groups(rows, toy.tokenizer(), 100)
    assert (len(examples), examples.without_target) == (9, 1)
    with pytest.raises(ValueError, match="none of the 1 rows has a token to compare"):
        data.encode_groups(rows[-1:], toy.tokenizer(), 100)

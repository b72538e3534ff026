"""From a row to the text that the model sees, and which characters of it are trained on."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainjax.data import answers
from trainjax.data.formats import Conversation, Text
from trainjax.data.templates import Write, has_tags, tagged, writer


class Rendered(NamedTuple):
    """A row as text, or a part of it.

    Attributes:
        text: all of it, with the template's control tokens as text.
        spans: the characters `[start, end)` that are trained on, in order.
        plain: no template made the text, so the tokenizer adds its own beginning and end tokens.
        unwritten: answers of the row that are not trained on, as the template does not write them.
        tools_ignored: the row has tools, and the template does not describe them.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    unwritten: int = 0
    tools_ignored: bool = False


def render(row: Conversation | Text, tokenizer: Any, *, template: bool = True) -> Rendered:
    """The text of a row that has to be one; see `renderings`.

    Raises:
        ValueError: also a row that the template makes several texts of.
    """
    first, *others = renderings(row, tokenizer, template=template)
    if others:
        raise ValueError(
            "the chat template writes earlier answers differently once later messages follow, so the "
            "several answers of one completion do not stand in one text; give completions of one "
            "answer, or use a template with {% generation %} tags"
        )
    return first


def renderings(
    row: Conversation | Text, tokenizer: Any, *, template: bool = True
) -> list[Rendered]:
    """The text of a row; several where a template writes earlier turns differently later on.

    Prompts and completions that are plain text become a user's and an assistant's message if the
    tokenizer has a chat template: what is trained is then what `generate` and `chat` will ask.

    Args:
        row: what a format read.
        tokenizer: a `PreTrainedTokenizerFast`.
        template: False to leave plain text as it is.

    Raises:
        ValueError: messages without a chat template, or that the template refuses.
    """
    if isinstance(row, Conversation):
        return _conversation(row, tokenizer)
    if not row.prompt or not template or tokenizer.chat_template is None:
        prompt = row.prompt if row.bare_prompt is None else row.bare_prompt
        text = prompt + row.completion
        return [Rendered(text, ((len(prompt), len(text)),), plain=True)]
    user = {"role": "user", "content": row.prompt}
    messages = row.messages or [user, {"role": "assistant", "content": row.completion}]
    return _conversation(Conversation(messages, prompt=len(messages) - 1), tokenizer)


def _conversation(row: Conversation, tokenizer: Any) -> list[Rendered]:
    write = writer(tokenizer, row.messages, row.tools)
    if has_tags(tokenizer, row.tools):
        texts, unwritten = _tagged(row, tokenizer, write)
    else:
        end = tokenizer.eos_token or ""
        texts, unwritten = answers.answered(write, row.messages, row.trained, end)
    first, *others = [Rendered(text, spans, plain=False) for text, spans in texts]
    ignored = _ignores_tools(row, tokenizer, write)
    return [first._replace(unwritten=unwritten, tools_ignored=ignored), *others]


def _ignores_tools(row: Conversation, tokenizer: Any, write: Write) -> bool:
    if row.tools is None:
        return False
    return writer(tokenizer, row.messages, None)(row.messages) == write(row.messages)


def _tagged(row: Conversation, tokenizer: Any, write: Write) -> tuple[list[answers.Answered], int]:
    """What the template itself says is the assistant's, of the turns that are trained on."""
    text, spans = tagged(tokenizer, row.messages, row.tools)
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    ends = list(range(1, len(turns) + 1))
    if len(spans) != len(turns):  # several tags in a turn, or none: how many up to each
        ends = [len(tagged(tokenizer, row.messages[: i + 1], row.tools)[1]) for i in turns]
    if sorted(ends) != ends or (ends or [0])[-1] != len(spans):
        raise ValueError(
            f"the {{% generation %}} tags of the chat template mark {len(spans)} places in "
            f"{len(turns)} answers, and not turn by turn; put one pair of tags around each answer"
        )
    of_turn = {turn: spans[a:b] for turn, a, b in zip(turns, [0, *ends], ends, strict=False)}
    said = {turn: "".join(text[a:b] for a, b in of_turn[turn]) for turn in row.trained}
    kept = [t for t in row.trained if answers.is_written(write, row.messages, t, said[t])]
    found = tuple(span for turn in kept for span in of_turn[turn])
    return [answers.Answered(text, found)], len(row.trained) - len(kept)

"""From a row to the text that the model sees, and which characters of it are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainjax.data.formats import Conversation, Text


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        text: all of it, with the template's control tokens as text.
        spans: the characters `[start, end)` that are trained on.
        plain: no template made the text, so the tokenizer adds its own beginning and end tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool


def render(row: Conversation | Text, tokenizer: Any, *, template: bool = True) -> Rendered:
    """The text of a row.

    Prompts and completions that are plain text become a user's and an assistant's message if the
    tokenizer has a chat template: what is trained is then what `generate` and `chat` will ask.

    Args:
        row: what a format read.
        tokenizer: a `PreTrainedTokenizerFast`.
        template: False to leave plain text as it is.

    Raises:
        ValueError: messages without a chat template, or that the template refuses.
    """
    if isinstance(row, Text):
        if not row.prompt or not template or tokenizer.chat_template is None:
            prompt = row.prompt if row.bare_prompt is None else row.bare_prompt
            text = prompt + row.completion
            return Rendered(text, ((len(prompt), len(text)),), plain=True)
        user = {"role": "user", "content": row.prompt}
        row = Conversation([user, {"role": "assistant", "content": row.completion}], only_last=True)
    return _conversation(row, tokenizer)


def _conversation(row: Conversation, tokenizer: Any) -> Rendered:
    text = apply_template(tokenizer, row.messages, row.tools)
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if row.only_last:
        turns = [len(row.messages) - 1]
    spans = tuple(_span(tokenizer, text, row, i) for i in turns)
    return Rendered(text, spans, plain=False)


def _span(tokenizer: Any, text: str, row: Conversation, turn: int) -> tuple[int, int]:
    """Where a turn's answer stands: after the prompt that generation would give, to the turn's end."""
    end_text = apply_template(tokenizer, row.messages[: turn + 1], row.tools)
    if turn == 0:  # no template renders an empty conversation alike: the answer begins at its text
        return text.index(str(row.messages[0]["content"])), len(end_text)
    start_text = apply_template(tokenizer, row.messages[:turn], row.tools, generation=True)
    if not text.startswith(end_text) or not end_text.startswith(start_text):
        raise ValueError(
            "the chat template writes earlier turns differently once later ones follow, so the "
            f"answer of message {turn} cannot be found in the text; train on its last turn alone "
            "with `prompt` and `completion` columns"
        )
    return len(start_text), len(end_text)


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    generation: bool = False,
) -> str:
    """The text of a conversation, with the template's control tokens as text.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        messages: of a conversation, oldest first.
        tools: that the template may describe.
        generation: end with the beginning of an assistant's answer.

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be written; use plain text"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation
        )
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error

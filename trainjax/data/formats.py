"""From a row of any known shape to one thing: text in pieces, some of which are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trainjax.data.sources import Row

Message = Mapping[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    Attributes:
        messages: dicts with `role` and `content`, and what else the template reads.
        tools: tool descriptions for the template, or None.
        only_last: train on the last message only (a completion), not on every assistant turn.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    only_last: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """Text without a template.

    Attributes:
        prompt: not trained on; may be empty.
        completion: trained on.
        bare_prompt: the prompt where no chat template frames it, if that is another.
    """

    prompt: str
    completion: str
    bare_prompt: str | None = None


Format = Callable[[Row], Conversation | Text]


def _messages(row: Row) -> Conversation:
    return Conversation(list_of_messages(row["messages"]), row.get("tools"))


def _conversations(row: Row) -> Conversation:
    roles = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
    roles |= {role: role for role in roles.values()}
    turns = row["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError("`conversations` is a list of turns with `from` and `value`")
    messages = []
    for turn in turns:
        if "from" not in turn or "value" not in turn:
            raise ValueError(
                f"a turn has `from` and `value`; this has {', '.join(turn) or 'nothing'}"
            )
        if turn["from"] not in roles:
            raise ValueError(f"a turn is from {turn['from']!r}; known are {', '.join(roles)}")
        messages.append({"role": roles[turn["from"]], "content": turn["value"]})
    return Conversation(messages, row.get("tools"))


def completion(row: Row) -> Conversation | Text:
    """`prompt` and `completion`, both text or both messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("`prompt` and `completion` are both text or both lists of messages")
    messages = [*list_of_messages(prompt), *list_of_messages(completion)]
    return Conversation(messages, row.get("tools"), only_last=len(completion) == 1)


def _alpaca(row: Row) -> Text:
    instruction, extra = _string(row, "instruction"), row.get("input") or ""
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    framed = f"### Instruction:\n{instruction}\n\n"
    framed += f"### Input:\n{extra}\n\n" if extra else ""
    return Text(prompt, _string(row, "output"), bare_prompt=f"{framed}### Response:\n")


def _text(row: Row) -> Text:
    return Text("", _string(row, "text"))


FORMATS: Mapping[tuple[str, ...], Format] = {
    ("messages",): _messages,
    ("prompt", "completion"): completion,
    ("instruction", "output"): _alpaca,
    ("conversations",): _conversations,
    ("text",): _text,
}
"""The columns of each known format, and how its rows are read; the first that fits is taken."""


def detect(columns: Sequence[str], formats: Mapping[tuple[str, ...], T]) -> T:
    """The reader of rows with these columns, from a table such as `FORMATS`.

    Raises:
        ValueError: none fits; the message says what was found and what is accepted.
    """
    for needed, read in formats.items():
        if set(needed) <= set(columns):
            return read
    accepted = "; ".join(" + ".join(needed) for needed in formats)
    raise ValueError(f"the columns are {', '.join(columns) or 'none'}; accepted are: {accepted}")


def _string(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` is text, this is {row[name]!r:.60}")
    return row[name]


def list_of_messages(value: Any) -> list[Message]:
    """The value, if it is messages."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise ValueError("messages are a list, not empty, of objects with `role` and `content`")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"a message is an object with `role` and `content`, this is {message!r:.80}"
            )
    return list(value)

"""From a row of any known shape to one thing: text in pieces, some of which are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trainjax.data.messages import Message, is_trained, list_of_messages, tools_of
from trainjax.data.sources import Row

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    Attributes:
        messages: dicts with `role` and `content`, and what else the template reads.
        tools: tool descriptions for the template, or None.
        prompt: how many of the first messages are a prompt, whose answers are not trained on.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    prompt: int = 0

    @property
    def trained(self) -> list[int]:
        """The messages that are trained on: the assistant's own, after the prompt, not switched off."""
        after = range(self.prompt, len(self.messages))
        answers = (i for i in after if self.messages[i]["role"] == "assistant")
        return [i for i in answers if is_trained(self.messages[i])]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text without a template.

    Attributes:
        prompt: not trained on; may be empty.
        completion: trained on.
        messages: the same for a chat template, the completion last; by default a user's and an
            assistant's.
        bare_prompt: the prompt where no chat template frames it, if that is another.
    """

    prompt: str
    completion: str
    bare_prompt: str | None = None
    messages: Sequence[Message] = ()


Format = Callable[[Row], Conversation | Text]


def _messages(row: Row) -> Conversation:
    return Conversation(list_of_messages(row["messages"]), tools_of(row))


def _conversations(row: Row) -> Conversation:
    if not isinstance(row["conversations"], Sequence) or isinstance(row["conversations"], str):
        raise ValueError("`conversations` is a list of turns with `from` and `value`")
    return Conversation(list_of_messages(row["conversations"]), tools_of(row))


def completion(row: Row) -> Conversation | Text:
    """`prompt` and `completion`, each text or messages; the assistant's of the completion are trained.

    Text beside messages is a user's in the prompt and the assistant's in the completion.
    """
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(answer, str):
        return Text(prompt, answer)
    before = [] if prompt in (None, []) else _turns("prompt", prompt, "user")
    after = _turns("completion", answer, "assistant")
    return Conversation([*before, *after], tools_of(row), prompt=len(before))


def _turns(name: str, value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence | Mapping):
        raise ValueError(f"`{name}` is text or messages, this is {value!r:.60}")
    return list_of_messages(value)


def _alpaca(row: Row) -> Conversation | Text:
    """`instruction`, `input` and `output`; a `history` of questions and answers comes before."""
    instruction, extra = _string(row, "instruction"), row.get("input") or ""
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    if row.get("history"):
        return _after_history(row["history"], prompt, _string(row, "output"))
    framed = f"### Instruction:\n{instruction}\n\n"
    framed += f"### Input:\n{extra}\n\n" if extra else ""
    return Text(prompt, _string(row, "output"), bare_prompt=f"{framed}### Response:\n")


def _after_history(history: Any, prompt: str, answer: str) -> Conversation:
    """A conversation whose earlier answers are trained on too, as LLaMA-Factory does it."""
    turns = [*history, (prompt, answer)] if isinstance(history, Sequence) else []
    if not turns or any(isinstance(turn, str) or len(turn) != 2 for turn in turns):
        raise ValueError(
            f"`history` is a list of pairs, a question and its answer each, this is {history!r:.60}"
        )
    roles = ("user", "assistant")
    said = [(role, text) for turn in turns for role, text in zip(roles, turn, strict=True)]
    return Conversation(list_of_messages([{"role": r, "content": text} for r, text in said]))


def introduced(made: Conversation | Text, row: Row) -> Conversation | Text:
    """The conversation after what the row's column `system` (or `system_prompt`) tells the model.

    Raises:
        ValueError: a column that is not text, or says another thing than the first message.
    """
    name = "system" if row.get("system") else "system_prompt"
    if not row.get(name) or (isinstance(made, Text) and not made.prompt):
        return made
    first = {"role": "system", "content": _string(row, name)}
    if isinstance(made, Text):
        user = {"role": "user", "content": made.prompt}
        messages = made.messages or [user, {"role": "assistant", "content": made.completion}]
        bare = made.prompt if made.bare_prompt is None else made.bare_prompt
        bare = f"{first['content']}\n\n{bare}"
        return dataclasses.replace(made, messages=[first, *messages], bare_prompt=bare)
    if made.messages[0] == first:
        return made
    if made.messages[0]["role"] == "system":
        raise ValueError(
            f"the column `{name}` says {row[name]!r:.40} and the first message another thing; keep one"
        )
    return dataclasses.replace(made, messages=[first, *made.messages], prompt=made.prompt + 1)


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


def supervised_reader(columns: Sequence[str]) -> Format:
    """The reader of rows for supervised fine-tuning with these columns.

    Raises:
        ValueError: no format fits, or the columns are a pair's, whose rejected answer nobody wants
            to be taught.
    """
    if {"chosen", "rejected"} <= set(columns) and not {"messages", "completion"} & set(columns):
        raise ValueError(
            f"the columns are {', '.join(columns)}: rows of pairs are for `trainjax dpo` or `trainjax "
            "reward`; supervised fine-tuning takes the chosen answer as `messages` or `completion`"
        )
    read = detect(columns, FORMATS)
    return lambda row: introduced(read(row), row)


def _string(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` is text, this is {row[name]!r:.60}")
    return row[name]

"""What is compared in a row: the prompt that its completions share, and each completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainjax.data.answers import shared_length
from trainjax.data.formats import Conversation, Text, completion, introduced
from trainjax.data.messages import Message, list_of_messages
from trainjax.data.sources import Row

_TURN = re.compile(r"\n\n(Human|Assistant):")  # as in Anthropic's hh-rlhf
_ROLES = {"Human": "user", "Assistant": "assistant"}


def compared(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected, each text or messages.

    Without a column `prompt` it is what both begin with: messages, or text up to the last marker of an
    assistant's turn. Conversations that hold the prompt may stand beside a column of it; turns before
    them may be in `conversations`, as ShareGPT has them.

    Raises:
        ValueError: conversations that begin with another prompt than the column's; texts that do not
            begin alike.
    """
    chosen, rejected = _answer(row["chosen"]), _answer(row["rejected"])
    prompt = row.get("prompt", row.get("conversations"))
    if not chosen or not rejected:  # nothing to compare
        return prompt, chosen, rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        return (prompt, chosen, rejected) if prompt is not None else _texts(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is None:
            raise ValueError("`chosen` and `rejected` are both text or both lists of messages")
        return prompt, chosen, rejected
    if prompt not in (None, []) and not _holds(chosen, rejected, prompt):
        return prompt, chosen, rejected
    return _conversations(chosen, rejected)


def joined(prompt: Any, answer: Any, row: Row) -> Conversation | Text:
    """A prompt with one completion, the row's tools, and what its column `system` says first."""
    return introduced(_joined(prompt, answer, row), row)


def _joined(prompt: Any, answer: Any, row: Row) -> Conversation | Text:
    if isinstance(answer, str) and isinstance(prompt, str) and len(turns := _turns(prompt)) > 1:
        reply = {"role": "assistant", "content": answer.strip()}
        return Text(prompt, answer, messages=[*turns[:-1], reply])
    tools = {name: row.get(name) for name in ("tools", "functions")}
    return completion({"prompt": prompt, "completion": answer, **tools})


def is_empty(answer: Any) -> bool:
    """Whether a completion says nothing: no text, or no message of the assistant that says anything."""
    if answer is None or isinstance(answer, str):
        return not (answer or "").strip()
    if not isinstance(answer, Sequence | Mapping):
        return False
    return not (answer and any(map(_says_something, list_of_messages(answer))))


def _says_something(message: Message) -> bool:
    said = (
        message.get(name) for name in ("content", "tool_calls", "reasoning_content", "thinking")
    )
    return message["role"] == "assistant" and any(
        one.strip() if isinstance(one, str) else one for one in said
    )


def _answer(value: Any) -> Any:
    """Text as it is, messages as `list_of_messages` reads them, nothing as no messages."""
    if isinstance(value, str) or value is None or value == []:
        return value or []
    if not isinstance(value, Sequence | Mapping):
        raise ValueError(f"a completion is text or messages, this is {value!r:.60}")
    return list_of_messages(value)


def _holds(chosen: list[Message], rejected: list[Message], prompt: Any) -> bool:
    """Whether the conversations begin with the prompt that stands beside them."""
    if not isinstance(prompt, str):
        before = list_of_messages(prompt)
        return all(
            one[: len(before)] == before and len(one) > len(before) for one in (chosen, rejected)
        )
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return False
    before, *_ = _conversations(chosen, rejected)
    if not any((one.get("content") or "").strip() == prompt.strip() for one in before):
        raise ValueError(
            f"`prompt` is {prompt!r:.60}, but `chosen` and `rejected` are conversations that do not "
            "begin with it; leave the column out, or give the answers alone"
        )
    return True


def _conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    alike = chosen[: shared_length(chosen, rejected)]
    answers = [marker.end() for marker in _TURN.finditer(alike) if marker[1] == "Assistant"]
    if not answers:
        raise ValueError(
            "`chosen` and `rejected` without `prompt` are lists of messages, or texts that begin alike "
            "up to a marker '\\n\\nAssistant:'; give the prompt in a column of its own"
        )
    return chosen[: answers[-1]], chosen[answers[-1] :], rejected[answers[-1] :]


def _turns(prompt: str) -> list[Message]:
    """The messages of a prompt in hh-rlhf's plain text, an empty answer last; [] for other text."""
    before, *parts = _TURN.split(prompt)
    if before or parts[-2:] != ["Assistant", ""]:
        return []
    names, texts = parts[::2], parts[1::2]
    return [
        {"role": _ROLES[name], "content": text.strip()}
        for name, text in zip(names, texts, strict=True)
    ]

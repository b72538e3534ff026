"""Where an assistant's answers stand in the text that a chat template writes, found by construction.

An answer begins where the prompt that generation gives ends, and ends where the text of the
conversation up to it ends: both are rendered, and nobody looks for its words. Where the prompt is no
beginning of the answered text (it may open a thought that the template then leaves out, or be refused),
the answer begins where the text parts from that with another answer in its place. Where a template
writes an answered turn differently once later ones follow, the turn has a text of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trainjax.data.messages import Message
from trainjax.data.templates import Write


class Answered(NamedTuple):
    """A text with answers in it.

    Attributes:
        text: of a conversation, or of its beginning.
        spans: the characters `[start, end)` of each answer with its end of turn, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def answered(
    write: Write, messages: Sequence[Message], turns: Sequence[int], end: str = ""
) -> tuple[list[Answered], int]:
    """Texts that hold each of some answers once, and how many the template does not write.

    It is one text, the whole conversation's, unless the template writes earlier turns differently once
    later ones follow: an answer that is not in a later one's text comes in that of its own prefix,
    which is what generation would have made.

    Args:
        write: renders messages.
        messages: of the conversation.
        turns: numbers of the messages that are trained on, ascending.
        end: the end-of-sequence token, which some templates write after the last turn only.

    Raises:
        ValueError: a message whose answer cannot be told from what comes before it.
    """
    whole = write(messages)
    prefix = functools.cache(lambda n: whole if n == len(messages) else write(messages[:n]))
    found: dict[str, list[tuple[int, int]]] = {whole: []}
    unwritten = 0
    for turn in reversed(turns):
        text = prefix(turn + 1)
        start = answer_start(write, messages, turn, text)
        if not is_written(write, messages, turn, text[start:]):
            unwritten += 1
            continue
        holder, stop = _beginning_with(text, found), len(text)
        if holder is None and _ends_twice(write, messages, turn, text, end):
            stop -= len(end)
            holder = _beginning_with(text[:stop], found)
        holder, stop = (text, len(text)) if holder is None else (holder, stop)
        found.setdefault(holder, []).insert(0, (start, stop))
    texts = [Answered(text, tuple(spans)) for text, spans in found.items() if spans]
    return texts[::-1] or [Answered(whole, ())], unwritten


def _beginning_with(text: str, found: Iterable[str]) -> str | None:
    return next((one for one in found if one.startswith(text)), None)


def _ends_twice(write: Write, messages: Sequence[Message], turn: int, text: str, end: str) -> bool:
    """Whether the end-of-sequence token ends the text after a turn that has an end of its own."""
    if not end or not text.endswith(end):
        return False
    marked = _marked(write, messages[: turn + 1], turn, text)
    alike = shared_length(text[::-1], marked[::-1])
    return bool(text[len(text) - alike :].removesuffix(end).strip())


def answer_start(write: Write, messages: Sequence[Message], turn: int, text: str) -> int:
    """Where the answer of message `turn` begins in the text of the messages up to it."""
    prompt = _prompt(write, messages[:turn])
    if prompt is not None and text.startswith(prompt):
        return len(prompt)
    marked = _marked(write, messages[: turn + 1], turn, text)
    if prompt is not None:
        _check_question(write, messages, turn, text)
    return shared_length(text, marked)


def _check_question(write: Write, messages: Sequence[Message], turn: int, text: str) -> None:
    """That what the answer replies to is in the text."""
    if _marked(write, messages[: turn + 1], turn - 1, text) == text:
        raise ValueError(
            f"the chat template leaves message {turn - 1} out once message {turn} answers it, which would "
            "be trained on without its question; use a template that writes earlier messages"
        )


def _prompt(write: Write, messages: Sequence[Message]) -> str | None:
    """What generation would be asked; None if the conversation begins with the answer, or the
    template refuses to ask there.
    """
    try:
        return write(messages, generation=True) if messages else None
    except ValueError:
        return None


def _marked(write: Write, messages: Sequence[Message], turn: int, text: str) -> str:
    """The text of the messages, with a character that is not in `text` in the place of what one says."""
    other = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
    said = {"role": messages[turn]["role"], "content": other}
    return write([*messages[:turn], said, *messages[turn + 1 :]])


def shared_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    parted = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(parted, min(len(first), len(second)))


def is_written(write: Write, messages: Sequence[Message], turn: int, answer: str) -> bool:
    """Whether the template writes what message `turn` says; one that knows no tools leaves calls out.

    Args:
        write: renders messages.
        messages: of the conversation.
        turn: number of the message.
        answer: what stands in the text for it.
    """
    content, calls = messages[turn].get("content") or "", messages[turn].get("tool_calls")
    if not calls and content.strip() in answer:
        return True
    silent = {"role": messages[turn]["role"], "content": content if calls else ""}
    try:
        return write([*messages[:turn], silent]) != write(messages[: turn + 1])
    except ValueError:
        return True

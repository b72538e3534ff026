"""A message of any known shape as one: a role, text as content, tool calls as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
_SHAREGPT |= {role: role for role in _SHAREGPT.values()}
_SHAREGPT |= {"observation": "tool"}


def list_of_messages(value: Any) -> list[Message]:
    """Messages, oldest first, of what a row holds; one message alone is a list of one.

    Raises:
        ValueError: no messages, or one that `message` cannot read.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
        raise ValueError("messages are a list, not empty, of objects with `role` and `content`")
    return [message(one) for one in value]


def message(value: Any) -> Message:
    """A message with `role`, text as `content` and whatever else the template may read.

    Args:
        value: an object with `role` and `content`, or `from` and `value` as ShareGPT has them. The
            content may be parts, `[{"type": "text", "text": "..."}]`; tool calls and their arguments
            may be JSON text.

    Raises:
        ValueError: another shape, in one sentence that names what was found.
    """
    if not isinstance(value, Mapping) or not value.keys() & {"role", "from"}:
        raise ValueError(f"a message is an object with `role` and `content`, this is {value!r:.80}")
    made = dict(value) if "role" in value else _of_sharegpt(value)
    made = {name: item for name, item in made.items() if item is not None or name == "role"}
    if not isinstance(made["role"], str):
        raise ValueError(f"the `role` of a message is text, this is {made['role']!r:.60}")
    if "content" in made:
        made["content"] = _text(made["content"])
    if made.get("function_call"):  # as OpenAI wrote a call before there were several in a message
        made["tool_calls"] = [{"type": "function", "function": made.pop("function_call")}]
    if made["role"] == "function":
        made["role"] = "tool"
    if made.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in _list_of("tool_calls", made["tool_calls"])]
    for name in ("weight", "train"):
        _check_switch(name, made.get(name))
    return made


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Descriptions of the row's tools, a list or JSON text of one; None where there are none.

    They are in the column `tools`, or in `functions`, as OpenAI called them before.
    """
    tools = _list_of("tools", row.get("tools") or [])
    functions = _list_of("functions", row.get("functions") or [])
    return [*tools, *({"type": "function", "function": one} for one in functions)] or None


def is_trained(message: Message) -> bool:
    """Whether an assistant's message is a target: its `weight` and `train` are not 0 or false."""
    return all(message.get(name) is None or bool(message[name]) for name in ("weight", "train"))


def _of_sharegpt(turn: Message) -> dict[str, Any]:
    if "value" not in turn:
        raise ValueError(f"a turn has `from` and `value`; this has {', '.join(turn)}")
    if turn["from"] not in _SHAREGPT:
        raise ValueError(f"a turn is from {turn['from']!r}; known are {', '.join(_SHAREGPT)}")
    rest = {name: item for name, item in turn.items() if name not in ("from", "value")}
    return {"role": _SHAREGPT[turn["from"]], "content": turn["value"], **rest}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"the `content` of a message is text or parts, this is {content!r:.60}")
    return "".join(map(_text_of_part, content))


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(
            f'a part of a content is text, {{"type": "text", "text": ...}}, this is {part!r:.80}'
        )
    return text


def _call(call: Any) -> Any:
    """A tool call, or its `function`, with arguments as an object."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a tool call is an object with a `function`, this is {call!r:.80}")
    if "function" in call:
        return {**call, "function": _call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    return {**call, "arguments": _parsed("arguments", call["arguments"] or "{}")}


def _list_of(name: str, value: Any) -> list[Any]:
    found = _parsed(name, value or "[]") if isinstance(value, str) else value
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ValueError(f"`{name}` is a list, or JSON text of one, this is {value!r:.60}")
    return list(found)


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is text, but not JSON: {text!r:.60} ({error})") from error


def _check_switch(name: str, value: Any) -> None:
    if value is not None and value not in (0, 1):
        raise ValueError(
            f"`{name}` of a message is 0, 1, true or false (trained or not), this is {value!r:.60}"
        )

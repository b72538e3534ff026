"""Chat templates: the text of messages, in the shape of them that a template can read."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from trainjax.data.messages import Message, list_of_messages, tools_of

Tools = Sequence[Any] | None
Shape = Callable[[Sequence[Message]], Sequence[Message]]
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue000"  # a character of private use, which no template writes by itself


@runtime_checkable
class Write(Protocol):
    """The text of messages, ending with the beginning of an answer for `generation`."""

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str: ...


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
        messages: of a conversation, oldest first, in any shape that `messages.message` reads.
        tools: that the template may describe.
        generation: end with the beginning of an assistant's answer.

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the messages.
    """
    made = list_of_messages(messages)
    return writer(tokenizer, made, tools_of({"tools": tools}))(made, generation=generation)


def writer(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> Write:
    """The template of a tokenizer, for a conversation and its beginnings.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        messages: of the whole conversation, as `list_of_messages` makes them.
        tools: that the template may describe.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    shape = _shape(tokenizer, messages, tools)
    return functools.partial(_write, shape, _options(tokenizer, tools))


def _write(
    shape: Shape,
    options: Mapping[str, Any],
    messages: Sequence[Message],
    *,
    generation: bool = False,
) -> str:
    return _rendered(shape(messages), options, generation=generation)[0]


def has_tags(tokenizer: Any, tools: Tools) -> bool:
    """Whether the template says itself what is the assistant's, by `{% generation %}`."""
    return bool(_TAG.search(_template(tokenizer, tools)))


def tagged(
    tokenizer: Any, messages: Sequence[Message], tools: Tools
) -> tuple[str, list[tuple[int, int]]]:
    """The text of messages, and the characters `[start, end)` inside each `{% generation %}`."""
    shaped = _shape(tokenizer, messages, tools)(messages)
    return _rendered(shaped, _options(tokenizer, tools), tags=True)


def _template(tokenizer: Any, tools: Tools) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be written; use plain text"
        )
    return tokenizer.get_chat_template(None, tools)


def _options(tokenizer: Any, tools: Tools) -> dict[str, Any]:
    """What a template sees besides messages, as `apply_chat_template` gives it."""
    return {
        "chat_template": _template(tokenizer, tools),
        "tools": tools,
        **tokenizer.special_tokens_map,
    }


def _rendered(
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    generation: bool = False,
    tags: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and what is inside of its tags if that is asked for.

    This is `tokenizer.apply_chat_template` without what it does anew for each text, a third of its time.
    """
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    if not messages:
        raise ValueError("a conversation has at least one message")
    render: Any = (
        chat_template_utils.render_jinja_template
    )  # its annotations are narrower than it is
    try:
        (text,), spans = render(
            [messages],
            **options,
            add_generation_prompt=generation,
            return_assistant_tokens_mask=tags,
        )
    except (TemplateError, KeyError, TypeError, AttributeError, IndexError) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses the conversation: {sentence}") from error
    return text, spans[0] if spans else []


# --- what shape of messages a template can read ---------------------------------------------------


def _shape(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> Shape:
    """The messages as the template can read them: contents as text or parts, arguments as objects or
    JSON text.
    """
    parts = _reads_parts_alone(_template(tokenizer, tools))
    contents: Shape = _with_parts if parts else lambda messages: messages
    if _reads_arguments(tokenizer, contents(messages), tools):
        return contents
    return lambda messages: _with_text_arguments(contents(messages))


@functools.lru_cache
def _reads_parts_alone(template: str) -> bool:
    """Whether a template writes a user's content that is parts, and not one that is text."""
    user = {"role": "user", "content": _PROBE}
    return not _writes(template, user) and _writes(template, *_with_parts([user]))


def _writes(template: str, message: Message) -> bool:
    try:
        options = {"chat_template": template, "bos_token": "", "eos_token": ""}
        return _PROBE in _rendered([message], options)[0]
    except ValueError:
        return False


def _with_parts(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _reads_arguments(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> bool:
    """Whether the template reads the arguments of calls as objects: one that takes JSON text refuses
    them, or writes them as Python would.
    """
    objects = [one for one in map(_arguments, _calls(messages)) if isinstance(one, Mapping)]
    odd = {repr(one) for one in objects} - {_json(one) for one in objects}
    if not odd:
        return True
    try:
        text, _ = _rendered(messages, _options(tokenizer, tools))
    except ValueError:
        return False
    return not any(one in text for one in odd)


def _calls(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [call for message in messages for call in message.get("tool_calls") or ()]


def _arguments(call: Mapping[str, Any]) -> Any:
    return call.get("function", call).get("arguments")


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": _json(arguments)} if isinstance(arguments, Mapping) else call


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

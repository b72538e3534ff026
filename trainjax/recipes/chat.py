"""Talk with a model in the terminal."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Any

import jax

from trainjax import models, rollout
from trainjax.recipes import _common as common
from trainjax.text import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.AnswerConfig):
    """A conversation: /reset forgets it, /exit or Ctrl-D ends it.

    The model's generation_config.json says where answers end; how tokens are drawn, these settings alone say.
    """

    temperature: float = 0.7
    """Divides the logits; 0 always takes the most probable token."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""


def main(config: Config) -> None:
    """Runs the job."""
    config.sampler()  # a wrong value is told before the model is loaded
    model = common.load_model(
        config.model,
        dtype=config.dtype,
        adapter=config.adapter,
        base_format=config.base_format,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 end no conversation
        sys.stdin.reconfigure(errors="replace")
    common.say(f"{config.model}: /reset forgets the conversation, /exit or Ctrl-D ends it")
    key, messages = jax.random.key(config.seed), config.messages()
    while (said := _asked()) not in (None, "/exit"):
        if said == "/reset":
            messages = config.messages()
            continue
        if said:
            key, turn = jax.random.split(key)
            messages = _turn(config, model, [*messages, {"role": "user", "content": said}], turn)


def _asked() -> str | None:
    try:
        return whole(input("> ").strip())
    except EOFError:
        print()
        return None


def _turn(config: Config, model: models.Model, messages: list[Any], key: jax.Array) -> list[Any]:
    """Prints the answer as it comes; returns the conversation with it, or without the last question."""
    answer = ""
    try:
        for piece in rollout.stream(
            model,
            rollout.prompt_ids(model.tokenizer, messages),
            max_new_tokens=config.max_new_tokens,
            sampler=config.sampler(),
            key=key,
            stop=config.stop,
        ):
            print(piece, end="", flush=True)
            answer += piece
    except ValueError as error:
        common.say(f"{error}; /reset begins anew")
        return messages[:-1]
    except KeyboardInterrupt:  # stops the answer, not the conversation
        pass
    print()
    return [*messages, {"role": "assistant", "content": answer}]

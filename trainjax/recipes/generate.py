"""Answer a prompt, or continue a text; the answer alone goes to the standard output."""

from __future__ import annotations

import dataclasses
import sys

import jax

from trainjax import rollout
from trainjax.recipes import Prose
from trainjax.recipes import _common as common
from trainjax.text import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.AnswerConfig):
    """Prints what a model answers to one prompt.

    Its generation_config.json says where answers end; how tokens are drawn, these settings alone say.
    """

    prompt: Prose
    """What the user says, or with --raw the text to continue."""
    raw: bool = False
    """Continue the prompt as it stands, without the chat template."""


def main(config: Config) -> None:
    """Runs the job."""
    sampler = config.sampler()
    model = common.load_model(
        config.model,
        dtype=config.dtype,
        adapter=config.adapter,
        base_format=config.base_format,
    )
    if config.raw:
        ids = rollout.prompt_ids(model.tokenizer, whole(config.prompt), raw=True)
    else:
        ids = rollout.prompt_ids(model.tokenizer, config.messages(config.prompt))
    pieces = rollout.stream(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        sampler=sampler,
        key=jax.random.key(config.seed),
        stop=config.stop,
    )
    for piece in pieces:
        print(piece, end="", flush=sys.stdout.isatty())
    print()

"""Whole models merged from files to files, a block of one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainjax.io import folder
from trainjax.io import tokenizer as tokenizers
from trainjax.io.folder import HfFolder
from trainjax.merging.method import Block, Method
from trainjax.merging.sources import Blocks, Source, check_alike, check_tokens, opened


def merge_models(
    out: str | Path,
    method: Method,
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    dtype: Any = None,
    tokenizer: str | Path | None = None,
    other_tokenizer: bool = False,
    block: int = 2**19,
) -> None:
    """Writes the folder of the merged model, which transformers and `trainjax.load` read.

    The folder appears whole or not at all. Tensors are read, merged in float32 and written in blocks
    of rows, so memory does not grow with the model (but for `.gguf` files, with their largest tensor,
    and for Timber, with the largest matrix that is wider than tall).

    Args:
        out: the folder; it may exist if it is empty.
        method: `ties(...)` and the like.
        models: hub ids, folders or `.gguf` files.
        base: what the models began as, for a method that needs it.
        dtype: of the floats written; by default as the base's are stored, or the first model's.
        tokenizer: the model, one of those merged, whose tokenizer, configuration and generation
            settings go along. By default the method's `speaker`, else the first with a chat template
            (the base is asked before the models), else the first.
        other_tokenizer: accept tokenizers to which the same id is different tokens.
        block: numbers of a tensor that are merged at a time.

    Raises:
        ValueError: a base that is missing or not asked for; a wrong number of models; models of
            different architectures, tensors or tokenizers; numbers that are not finite or do not fit
            the dtype; a folder that holds something.
        OSError: the folder cannot be written; nothing is left behind.
    """
    check_count(method, len(models), has_base=base is not None)
    merged = [opened(model) for model in models]
    start = None if base is None else opened(base)
    first, *others = ([] if start is None else [start]) + merged
    for other in others:
        check_alike(first, other)
    speaker, speech = _speaker(method, merged, start, tokenizer, other_tokenizer)
    kinds = {
        name: (shape, np.dtype(dtype or first.files.dtype(name)))
        for name, shape in first.shapes.items()
    }

    def parts(name: str) -> Iterator[np.ndarray]:
        blocks = Blocks(start, merged, name, block)
        yield from _merged(method, blocks, kinds[name][1])

    with folder.written(Path(out)) as temporary:
        folder.stream_shards(temporary, kinds, parts)
        config = {k: v for k, v in speaker.files.config.items() if k != "torch_dtype"}
        largest = max(kinds.values(), key=lambda kind: np.prod(kind[0]))
        folder.write_json(temporary / "config.json", config | {"dtype": largest[1].name})
        _copy_generation_config(speaker, temporary)
        if speech is not None:
            tokenizers.save(speech, temporary)


def check_count(method: Method, models: int, *, has_base: bool) -> None:
    """Raises ValueError unless the method takes so many models, with a base or without."""
    if method.needs_base and not has_base:
        raise ValueError("this method needs the base, which the models to merge began as")
    if has_base and not method.needs_base:
        raise ValueError("this method has no base: give it as one of the models to merge")
    if models < method.least or (method.most is not None and models > method.most):
        wanted = "1 model" if method.most == 1 else f"{method.least} models"
        wanted = wanted if method.most else f"{method.least} models or more"
        raise ValueError(f"this method, as it is set, merges {wanted}, not {models}")


def _merged(method: Method, blocks: Blocks, dtype: np.dtype) -> Iterator[np.ndarray]:
    again: Blocks | tuple[Block, ...] = blocks
    if (only := _only(blocks)) is not None:
        again = (only,)  # read once, however often it is measured
    measured = method.measure(again)
    for block in again:
        with np.errstate(over="ignore"):
            part = method.combine(block, measured).astype(dtype)
        if not np.isfinite(part).all():
            raise ValueError(f"the merged {block.name} has numbers that are too large for {dtype}")
        yield part


def _only(blocks: Blocks) -> Block | None:
    """The first block, if there is no other."""
    if blocks.count > 1:
        return None
    (block,) = blocks
    return block


def _speaker(
    method: Method,
    models: Sequence[Source],
    base: Source | None,
    named: str | Path | None,
    other_tokenizer: bool,
) -> tuple[Source, Any]:
    """The model that gives tokenizer and configuration to the merged one, and its tokenizer."""
    sources = ([] if base is None else [base]) + list(models)
    voices = [source.files.tokenizer() for source in sources]
    if not other_tokenizer:
        for source, voice in zip(sources[1:], voices[1:], strict=True):
            check_tokens(sources[0], voices[0], source, voice)
    if named is not None:
        labels = [source.label for source in sources]
        if str(named) not in labels:
            raise ValueError(
                f"tokenizer={str(named)!r} is none of the merged models {', '.join(labels)}"
            )
        chosen = labels.index(str(named))
    elif method.speaker is not None:
        chosen = method.speaker + (base is not None)
    else:
        templates = (i for i, voice in enumerate(voices) if voice and voice.chat_template)
        chosen = next(templates, 0)
    return sources[chosen], voices[chosen]


def _copy_generation_config(source: Source, out: Path) -> None:
    if isinstance(source.files, HfFolder) and (kept := source.files.generation()):
        folder.write_json(out / folder.GENERATION, kept)

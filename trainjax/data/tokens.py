"""From a text and its trained spans to token ids and a mask; no token reaches over a span's edge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from trainjax.data.render import Rendered
from trainjax.text import whole

Ids = Int[np.ndarray, " tokens"]
Mask = Bool[np.ndarray, " tokens"]


def tokenized(texts: Sequence[Rendered], tokenizer: Any) -> Iterator[tuple[Ids, Mask]]:
    """Ids and mask of targets of each text.

    Args:
        texts: plain ones get the tokenizer's own beginning and end tokens. Half a surrogate pair is U+FFFD.
        tokenizer: a `PreTrainedTokenizerFast`.
    """
    texts = [text._replace(text=whole(text.text)) for text in texts]
    frame = _frame(tokenizer)
    batch = tokenizer.backend_tokenizer.encode_batch(
        [text.text for text in texts], add_special_tokens=False
    )
    for text, encoding in zip(texts, batch, strict=True):
        ids, trained = _masked(text, encoding, tokenizer)
        if text.plain:
            ids, trained = _framed(ids, trained, *frame, tokenizer.eos_token_id)
        trained[:1] = False
        yield ids, trained


def _masked(text: Rendered, encoding: Any, tokenizer: Any) -> tuple[Ids, Mask]:
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    ends = {0, len(text.text), *offsets[:, 1].tolist()}
    if not ends.issuperset(itertools.chain(*text.spans)):
        return _in_pieces(text, tokenizer)
    trained = np.zeros(len(offsets), bool)
    for first, last in text.spans:
        trained |= (offsets[:, 0] >= first) & (offsets[:, 0] < last)
    return np.asarray(encoding.ids, np.int32), trained


def _in_pieces(text: Rendered, tokenizer: Any) -> tuple[Ids, Mask]:
    """The text cut at the edges of its spans and tokenized piece by piece."""
    edges = sorted({0, len(text.text), *itertools.chain(*text.spans)})
    ids, trained = [], []
    for first, last in itertools.pairwise(edges):
        piece = _piece(text.text[first:last], tokenizer, inner=first > 0)
        ids += piece
        trained += [any(a <= first and last <= b for a, b in text.spans)] * len(piece)
    return np.asarray(ids, np.int32), np.asarray(trained, bool)


def _piece(text: str, tokenizer: Any, *, inner: bool) -> list[int]:
    """Ids of a piece; one inside a text follows a line's end, as SentencePiece puts a space before
    what begins a text.
    """
    encode = tokenizer.backend_tokenizer.encode
    alone = encode(text, add_special_tokens=False).ids
    if not inner:
        return alone
    line = encode("\n", add_special_tokens=False).ids
    after = encode(f"\n{text}", add_special_tokens=False).ids
    return after[len(line) :] if after[: len(line)] == line else alone


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after any text."""
    encoding = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    added = np.asarray(encoding.special_tokens_mask, bool)
    text = np.flatnonzero(~added)
    if not len(text):  # a vocabulary without this letter
        return encoding.ids, []
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def _framed(
    ids: Ids, trained: Mask, before: list[int], after: list[int], end: int | None
) -> tuple[Int[np.ndarray, " framed"], Bool[np.ndarray, " framed"]]:
    """With the tokens that the tokenizer adds, and the end of sequence as a target; each of them once,
    though the text may hold it already.
    """
    found = ids.tolist()
    before = [] if found[: len(before)] == before else before
    after = [] if after and found[-len(after) :] == after else after
    if end is not None and [*found, *after][-1:] != [end]:
        after = [*after, end]
    masks = [np.zeros(len(before), bool), trained, np.zeros(len(after), bool)]
    targets = np.concatenate(masks)
    targets[-1:] |= end is not None
    return np.concatenate([before, ids, after]).astype(np.int32), targets

"""The blocks that a GGUF file holds, kept in memory as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from trainjax.quant.format import Format
from trainjax.quant.q4_1 import from_blocks as from_q4_1
from trainjax.quant.q8_0 import from_blocks as from_q8_0
from trainjax.quant.quantised import Quantised
from trainjax.types import Blocks, Checkpoint

KINDS: Mapping[str, Callable[[Blocks], Quantised]] = {
    "Q4_1": from_q4_1,
    "Q8_0": from_q8_0,
}


@functools.cache
def stored() -> Format:
    """The matrices in the blocks of the file that they are loaded from: nothing is rounded again.

    For GGUF files of Q8_0 or Q4_1, all layers of a matrix in the same.
    """
    return Format(_encode, _read)


def _read(checkpoint: Checkpoint, tensor: str) -> Blocks:
    blocks = checkpoint.blocks(tensor)
    kinds = " or ".join(KINDS)
    if blocks is None:
        raise ValueError(
            f"{tensor} is not in blocks: only a .gguf file's matrices can stay as stored, in {kinds}"
        )
    if blocks.kind not in KINDS:
        raise ValueError(
            f"{tensor} is stored as {blocks.kind}; what can stay as stored is {kinds}, others can be "
            "quantised anew"
        )
    return blocks


def _encode(blocks: Blocks) -> Quantised:
    if not isinstance(blocks, Blocks):
        raise ValueError("it comes from no file: only what is loaded can stay as stored")
    return KINDS[blocks.kind](blocks)

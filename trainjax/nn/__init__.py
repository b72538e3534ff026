"""Flax Linen layers of a decoder. They read their weights from the params and multiply; a weight may
be an array or any `trainjax.types.Weight`, and no layer knows which.
"""

from trainjax.nn.decoder import (
    Cache,
    Decoder,
    DecoderConfig,
    body,
    check_heads,
    head,
    init_cache,
    start_cache,
)
from trainjax.nn.flops import flops_per_token
from trainjax.nn.virtual import num_virtual_tokens

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "body",
    "check_heads",
    "flops_per_token",
    "head",
    "init_cache",
    "num_virtual_tokens",
    "start_cache",
]

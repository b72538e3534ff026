"""Flax Linen layers of a decoder. They read their weights from the params and multiply; a weight may
be an array or any `trainjax.types.Weight`, and no layer knows which.
"""

from trainjax.nn.decoder import Cache, Decoder, DecoderConfig, body, head, init_cache
from trainjax.nn.flops import flops_per_token

__all__ = ["Cache", "Decoder", "DecoderConfig", "body", "flops_per_token", "head", "init_cache"]

"""Qwen2 and Qwen2.5: Llama's architecture and names, with biases on queries, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainjax.models import llama
from trainjax.nn import DecoderConfig

TENSORS = llama.TENSORS


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The architecture that a `config.json` describes.

    Raises:
        ValueError: a sliding window on some layers only, which is not supported.
    """
    if hf.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported for Qwen2")
    return dataclasses.replace(llama.config(hf), qkv_bias=True, output_bias=False)

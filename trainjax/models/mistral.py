"""Mistral: Llama's architecture and names, with a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainjax.models import llama
from trainjax.nn import DecoderConfig

TENSORS = llama.TENSORS


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """The architecture that a `config.json` describes."""
    return dataclasses.replace(llama.config(hf), window=hf.get("sliding_window"))

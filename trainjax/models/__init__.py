"""Model families, one file each, and what they have in common: load, save, adapters on disk.

A family is a file named after the `model_type` of its `config.json`, with `config(hf)` that reads the
architecture and `TENSORS` that names the tensors. Nothing registers it; the files whose names begin
with an underscore are the common part. Any other Flax module comes in by `from_linen` or `from_nnx`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainjax.models._adapters import is_scorer, load_adapter, save_adapter, save_scorer
from trainjax.models._flax import FlaxModel
from trainjax.models._linen import from_linen
from trainjax.models._load import load, load_scorer, random_model
from trainjax.models._model import Model, check_tokens
from trainjax.models._save import save_model

if TYPE_CHECKING:
    from trainjax.models._gguf import save_gguf as save_gguf
    from trainjax.models._nnx import from_nnx as from_nnx

__all__ = [
    "FlaxModel",
    "Model",
    "check_tokens",
    "from_linen",
    "from_nnx",
    "is_scorer",
    "load",
    "load_adapter",
    "load_scorer",
    "random_model",
    "save_adapter",
    "save_gguf",
    "save_model",
    "save_scorer",
]


_HOMES = {"from_nnx": "_nnx", "save_gguf": "_gguf"}


def __getattr__(name: str) -> Any:
    # Where they are used: flax.nnx is tied to a matching JAX, and Linen is not; GGUF files need `gguf`.
    if name in _HOMES:
        return getattr(importlib.import_module(f"trainjax.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trainjax.models' has no attribute {name!r}")

"""Model families, one file each, and what they have in common: load, save, adapters on disk.

A family is a file named after the `model_type` of its `config.json`, with `config(hf)` that reads the
architecture and `TENSORS` that names the tensors. Nothing registers it; the files whose names begin
with an underscore are the common part.
"""

from trainjax.models._adapters import is_scorer, load_adapter, save_adapter, save_scorer
from trainjax.models._load import load, load_scorer, random_model
from trainjax.models._model import Model
from trainjax.models._save import save_model

__all__ = [
    "Model",
    "is_scorer",
    "load",
    "load_adapter",
    "load_scorer",
    "random_model",
    "save_adapter",
    "save_model",
    "save_scorer",
]

"""A model as one GGUF file that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import numpy as np
from gguf import GGMLQuantizationType

from trainjax import tree
from trainjax.io import gguf_write
from trainjax.models._model import Model, config_json, tensor_names
from trainjax.models._save import host_array
from trainjax.types import Blocks, Params


def save_gguf(
    path: str | Path,
    model: Model,
    params: Params | None = None,
    kind: GGMLQuantizationType = gguf_write.F16,
) -> None:
    """Writes a file that llama.cpp and `load` read, tokenizer and chat template in it.

    Args:
        path: the file; it must not exist. It appears whole or not at all.
        model: for the architecture, the tensors' names and the tokenizer.
        params: plain arrays, `lora.merge(model.params, adapter)` say; by default the model's own.
        kind: of the matrices: F32, F16, BF16 or Q8_0.

    Raises:
        ValueError: params that are not plain arrays; as `io.gguf_write.write`.
    """
    checkpoint = _InMemory(model, model.params if params is None else params)
    gguf_write.write(path, checkpoint, kind, name=Path(model.source).name)


@final
class _InMemory:
    """Params as a `Checkpoint`; `read` brings one tensor to this host."""

    config: dict[str, Any]

    def __init__(self, model: Model, params: Params) -> None:
        self.config = config_json(model, params)
        self._tokenizer = model.tokenizer
        self._leaves = tree.flatten(params)
        self._places: dict[str, tuple[str, int | None]] = {}
        for name, leaf in self._leaves.items():
            if tree.is_weight(leaf):
                raise ValueError(
                    f"{name} is a {type(leaf).__name__}, not an array; merge the adapter first"
                )
        for name, tensors in tensor_names(model.hf, params).items():
            for index, tensor in enumerate(tensors):
                self._places[tensor] = name, index if name.startswith("layers/") else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor: self._shape(*place) for tensor, place in self._places.items()}

    def _shape(self, name: str, index: int | None) -> tuple[int, ...]:
        whole = tuple(self._leaves[name].shape)
        own = whole if index is None else whole[1:]
        return own[::-1] if name.endswith("kernel") else own

    def read(self, name: str) -> np.ndarray:
        place, index = self._places[name]
        leaf = self._leaves[place]
        value = host_array(leaf if index is None else leaf[index])
        return value.T if place.endswith("kernel") else value

    def blocks(self, name: str) -> Blocks | None:
        return None

    def tokenizer(self) -> Any | None:
        return self._tokenizer

"""Adapters on disk, in the format of the PEFT library: what is trained here loads there, and back."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import numpy as np

import trainjax.peft
from trainjax import tree
from trainjax.io import peft as files
from trainjax.models._model import Model, tensor_names
from trainjax.types import Params, Peft


def save_adapter(path: str | Path, model: Model, method: Peft, adapter: Params) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads.

    The base's fingerprint goes with it, so that loading it over another base is noticed.

    Args:
        path: the folder; one of an earlier adapter is replaced.
        model: the base that it was trained on.
        method: `peft.lora(...)` and the like.
        adapter: the trained arrays.
    """
    exported = method.export(adapter, _modules(model))
    base = {"task_type": "CAUSAL_LM", "base_model_name_or_path": model.source}
    files.write(Path(path), exported._replace(fields=base | exported.fields), model.fingerprint)


def load_adapter(
    path: str | Path, model: Model, *, other_base: bool = False
) -> tuple[Peft, Params]:
    """The method and the arrays of an adapter in PEFT's format.

    Args:
        path: its folder.
        model: the base that it goes on.
        other_base: accept an adapter that was trained here on another base of the same shape.

    Raises:
        ValueError: not an adapter, a kind or a setting that is not supported, tensors that do not
            fit, or trained on another base.
    """
    found, fingerprint = files.read(Path(path))
    if fingerprint not in (None, model.fingerprint) and not other_base:
        raise ValueError(
            f"{path} was trained on another base (fingerprint {fingerprint}; {model.source} has "
            f"{model.fingerprint}); load that base, or say that another is meant: other_base"
        )
    package = trainjax.peft
    for module in pkgutil.iter_modules(package.__path__):
        method = importlib.import_module(f"{package.__name__}.{module.name}")
        loaded = method.from_peft(found, _modules(model), model.params)
        if loaded is not None:
            return loaded
    raise ValueError(
        f"{path}: adapters of peft_type={found.fields.get('peft_type')!r} are not supported"
    )


def _modules(model: Model) -> dict[str, str]:
    """PEFT's module for each of our matrices, by full name, layer number included."""
    modules = {}
    leaves = tree.flatten(model.params)
    for name, tensors in tensor_names(model.hf, model.params).items():
        if not name.endswith("kernel"):
            continue
        stack = leaves[name].shape[:-2]
        for index, tensor in zip(np.ndindex(*stack), tensors, strict=True):
            modules[tree.numbered(name, index)] = tensor.removesuffix(".weight")
    return modules

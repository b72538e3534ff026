"""The files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainjax.io import folder
from trainjax.types import PeftFiles

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE = "trainjax_base"  # our key in the safetensors metadata, which other readers pass over


def write(path: Path, files: PeftFiles, fingerprint: str) -> None:
    """Writes an adapter's folder; each file appears whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor for name, tensor in files.tensors.items()}
    with folder.replaced(path / _TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _BASE: fingerprint})
    with folder.replaced(path / _CONFIG) as temporary:
        folder.write_json(temporary, files.fields)


def read(path: Path) -> tuple[PeftFiles, str | None]:
    """An adapter's settings and tensors, and the fingerprint of its base if we wrote it.

    Args:
        path: the adapter's folder, or a run's folder with the adapter in `adapter/`.

    Raises:
        ValueError: not an adapter's folder, or one whose files are damaged.
    """
    if not (path / _CONFIG).is_file() and (path / "adapter" / _CONFIG).is_file():
        path = path / "adapter"
    if not (path / _CONFIG).is_file():
        raise ValueError(f"{path} is not an adapter's folder: it has no {_CONFIG}")
    if not (path / _TENSORS).is_file():
        raise ValueError(f"{path} has no {_TENSORS} (adapters in pickle files are never loaded)")
    try:
        fields = json.loads((path / _CONFIG).read_text())
        with safe_open(path / _TENSORS, framework="np", backend="pread") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return PeftFiles(fields, named), metadata.get(_BASE)

"""The files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainjax.io import folder
from trainjax.types import PeftFiles

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OF_NO_MODULE = ("prompt_embeddings",)  # virtual tokens, which PEFT writes without the prefix
_BASE = "trainjax_base"  # our key in the safetensors metadata, which other readers pass over


def write(path: Path, files: PeftFiles, fingerprint: str | None) -> None:
    """Writes an adapter's folder, with its base's fingerprint; each file appears whole or not at all."""
    if not folder.is_writer():
        return
    path.mkdir(parents=True, exist_ok=True)
    tensors = {_full(name): tensor for name, tensor in files.tensors.items()}
    with folder.replaced(path / _TENSORS) as temporary:
        base = {} if fingerprint is None else {_BASE: fingerprint}
        save_file(tensors, temporary, metadata={"format": "pt"} | base)
    with folder.replaced(path / _CONFIG) as temporary:
        folder.write_json(temporary, files.fields)


def _full(name: str) -> str:
    """A tensor's name with the prefix of the wrapped model; what the wrapper itself holds has its own."""
    return name if name.startswith("base_model.") or name in _OF_NO_MODULE else _PREFIX + name


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
        fields = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        with safe_open(path / _TENSORS, framework="np", backend="pread") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return PeftFiles(fields, named), metadata.get(_BASE)


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_refuses(fields: Mapping[str, Any]) -> str:
    """Why vLLM would not serve an adapter as PEFT does, or an empty text if it would.

    Args:
        fields: what `adapter_config.json` says.

    Source: vLLM's `PEFTHelper`, which raises for all but the last; ranks and scales by module it has
    read only lately, and versions before computed another function in silence.
    """
    if (kind := fields.get("peft_type")) != "LORA":
        return f"its peft_type is {kind}, and vLLM loads LORA"
    rank = _largest_rank(fields)
    reasons = {
        "it is of DoRA (use_dora)": fields.get("use_dora"),
        f"it saves whole modules ({fields.get('modules_to_save')})": fields.get("modules_to_save"),
        f"it trains biases (bias={fields.get('bias')!r})": fields.get("bias", "none") != "none",
        f"its rank {rank} is above {_VLLM_RANKS[-1]}": rank > _VLLM_RANKS[-1],
        "its ranks or scales differ by module (rank_pattern, alpha_pattern), which many versions ignore": (
            fields.get("rank_pattern") or fields.get("alpha_pattern")
        ),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def vllm_rank(fields: Mapping[str, Any]) -> int:
    """The smallest `--max-lora-rank` of vLLM's that an adapter of LoRA fits in."""
    return next(rank for rank in _VLLM_RANKS if rank >= _largest_rank(fields))


def _largest_rank(fields: Mapping[str, Any]) -> int:
    return max([fields["r"], *(fields.get("rank_pattern") or {}).values()])

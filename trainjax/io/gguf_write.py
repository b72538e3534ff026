"""Writes GGUF files, the format of llama.cpp, from any `Checkpoint`; `io.gguf` reads them back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    quants,
)

from trainjax.io import folder
from trainjax.io.gguf_architectures import LLAMA_NAMES, llama3_factors, llama_rows
from trainjax.io.gguf_tokenizer import to_gguf
from trainjax.types import Checkpoint

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0

_FILE_TYPES = {
    F32: LlamaFileType.ALL_F32,
    F16: LlamaFileType.MOSTLY_F16,
    BF16: LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_DTYPES: dict[GGMLQuantizationType, Any] = {F32: np.float32, F16: np.float16}
_CHUNK = 1 << 22
"""Numbers converted at a time: `gguf.quants` makes several arrays as large as what it gets."""


def write(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    kind: GGMLQuantizationType = F16,
    *,
    name: str = "",
) -> None:
    """Writes a model as one file that llama.cpp loads.

    Matrices, the embedding and the head among them, become `kind`; norms and biases float32, and float16
    what Q8_0 cannot hold because its rows are no multiple of 32. So does llama.cpp's converter. Tensors
    are read, converted and written one after another; one is in memory at a time.

    Args:
        path: the file; it must not exist. It appears whole or not at all.
        checkpoint: of a Llama, a Mistral or a Qwen2. llama.cpp has no sliding window for Mistral: a
            warning is logged where the model has one.
        kind: F32, F16, BF16 or Q8_0. Q8_0 is 32 numbers that share a float16 scale, as `round(x / scale)`.
        name: `general.name`, which llama.cpp shows.

    Raises:
        ValueError: the file exists; another architecture or setting that the file cannot say; a tensor
            that is missing, unknown, not finite or too large for float16; a tokenizer that `to_gguf`
            refuses. Nothing is left behind.

    Source: Q8_0 is bit by bit what `llama_model_quantize` makes of the F32 file, and llama.cpp continues
    texts as `generate` does; both with the llama.cpp of llama-cpp-python 0.3.36.
    """
    path = Path(path)
    if kind not in _FILE_TYPES:
        known = ", ".join(each.name for each in _FILE_TYPES)
        raise ValueError(f"{kind.name} cannot be written; {known} can")
    if path.exists():
        raise ValueError(f"{path} exists already; give the name of a new file")
    layout = _layout(checkpoint)
    plan = _plan(checkpoint, layout, kind)
    writer = GGUFWriter(None, layout.architecture)
    _add_fields(writer, checkpoint, layout, kind, name)
    for item in plan:
        block, size = GGML_QUANT_SIZES[item.kind]
        num_bytes = int(np.prod(item.shape)) // block * size
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), num_bytes, item.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder.replaced(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in plan:
                writer.write_tensor_data(_converted(item, _values(item, checkpoint, layout)))
        finally:
            writer.close()


# --- the architecture ---------------------------------------------------------------------------


class _Layout(NamedTuple):
    """What a config.json says, in the numbers that a GGUF file holds.

    Attributes:
        architecture: llama.cpp's name.
        hf: the config, with the number of heads of queries and keys filled in.
        heads, kv_heads, head_dim: of the attention.
        theta: base of the rotary frequencies.
        linear: what positions are divided by.
        factors: what each frequency is divided by, `[head_dim / 2]`, or None.
    """

    architecture: str
    hf: Mapping[str, Any]
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    linear: float
    factors: np.ndarray | None


_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's by `model_type`."""


def _layout(checkpoint: Checkpoint) -> _Layout:
    hf = checkpoint.config
    _check_config(hf)
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    return _Layout(
        architecture=_ARCHITECTURES[hf["model_type"]],
        hf={**hf, "num_attention_heads": heads, "num_key_value_heads": kv_heads},
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        theta=theta,
        **_scaling(scaling, theta, head_dim),
    )


def _check_config(hf: Mapping[str, Any]) -> None:
    if hf.get("model_type") not in _ARCHITECTURES:
        raise ValueError(
            f"model_type={hf.get('model_type')!r} cannot be written as GGUF; "
            f"{', '.join(_ARCHITECTURES)} can"
        )
    if hf.get("quantization_config"):
        raise ValueError(
            "the model's weights are quantised (quantization_config); give the model that was quantised"
        )
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={hf['hidden_act']!r} cannot be written as GGUF; silu can")
    if hf.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true cannot be written as GGUF")
    if hf["model_type"] == "mistral" and hf.get("sliding_window"):
        logging.getLogger(__name__).warning(
            "llama.cpp attends to the whole text where this model attends to the last %d tokens",
            hf["sliding_window"],
        )


def _scaling(scaling: Mapping[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """The fields of `_Layout` that say how rotary frequencies are scaled."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", 1.0) != 1.0
    if partial or kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rotary positions of {dict(scaling)} cannot be written; default, linear and llama3 can"
        )
    if kind != "llama3":
        return {"linear": float(scaling.get("factor", 1.0)), "factors": None}
    wavelengths = 2 * np.pi * theta ** (np.arange(head_dim // 2) / (head_dim // 2))
    low = float(scaling["low_freq_factor"])  # only ratios to it count
    factors = llama3_factors(
        wavelengths,
        float(scaling["factor"]),
        scaling["high_freq_factor"] / low,
        scaling["original_max_position_embeddings"] / low,
    )
    return {"linear": 1.0, "factors": factors.astype(np.float32)}


def _add_fields(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    layout: _Layout,
    kind: GGMLQuantizationType,
    name: str,
) -> None:
    hf, rows = layout.hf, checkpoint.shapes()[_EMBEDDING][0]
    writer.add_type("model")
    if name:
        writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf.get("max_position_embeddings", 2048))
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.kv_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(hf.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(layout.theta)
    if layout.linear != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(layout.linear)
    for key, value in _vocabulary(checkpoint, rows).items():
        _add(writer, key, value)


def _vocabulary(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    """The tokenizer's fields; without one, the ids that the config names."""
    if (tokenizer := checkpoint.tokenizer()) is not None:
        return to_gguf(tokenizer, rows)
    ids = {
        key: checkpoint.config.get(f"{role}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    named = {f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if isinstance(i, int)}
    return {"tokenizer.ggml.model": "none", **named}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


# --- tensors ------------------------------------------------------------------------------------

_EMBEDDING, _HEAD, _SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", "masked_bias")  # that old files carry
_GGUF_NAMES = {hf: ours for ours, hf in LLAMA_NAMES.items() if hf is not None}
_ROPE = "rope_freqs.weight"


class _Item(NamedTuple):
    """One tensor to write: its name in the file, where it comes from, its shape and type."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


def _plan(checkpoint: Checkpoint, layout: _Layout, kind: GGMLQuantizationType) -> list[_Item]:
    shapes = dict(checkpoint.shapes())
    if _SCORE in shapes:
        raise ValueError(
            "a reward model cannot be written as GGUF: the format has no place for a head that scores"
        )
    tied = layout.hf.get("tie_word_embeddings", False)
    if tied:
        shapes.pop(_HEAD, None)
    if missing := [name for name in _needed(layout, tied) if name not in shapes]:
        raise ValueError(f"the model has no {missing[0]!r} ({len(missing)} tensors are missing)")
    plan = [
        _Item(_gguf_name(name), name, shape, _kind(shape, kind))
        for name, shape in shapes.items()
        if not name.endswith(_BUFFERS)
    ]
    if layout.factors is not None:
        plan.insert(0, _Item(_ROPE, _ROPE, layout.factors.shape, F32))
    return plan


def _needed(layout: _Layout, tied: bool) -> Iterator[str]:
    """The weights that every model of these families has."""
    for template in _GGUF_NAMES:
        if f"{template}.weight" == _HEAD and tied:
            continue
        for layer in range(layout.hf["num_hidden_layers"] if "{}" in template else 1):
            yield f"{template.format(layer)}.weight"


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    layer = next((part for part in parts if part.isdecimal()), "")
    template = ".".join("{}" if part.isdecimal() else part for part in parts)
    if template not in _GGUF_NAMES or kind not in ("weight", "bias"):
        raise ValueError(f"the tensor {name!r} has no place in a GGUF file")
    return f"{_GGUF_NAMES[template].format(layer)}.{kind}"


def _kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return F32
    return F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _values(item: _Item, checkpoint: Checkpoint, layout: _Layout) -> np.ndarray:
    if item.name == _ROPE:
        assert layout.factors is not None
        return layout.factors
    values = checkpoint.read(item.source)
    order = None
    if layout.architecture == "llama":
        order = llama_rows(item.source, len(values), layout.hf)
    return values if order is None else values[np.argsort(order)]


def _converted(item: _Item, values: np.ndarray) -> np.ndarray:
    """The tensor's bytes; rows are converted some at a time."""
    rows = np.atleast_2d(values)
    step = max(1, _CHUNK // rows.shape[-1])
    parts = [
        _encoded(item, np.ascontiguousarray(rows[first : first + step], np.float32))
        for first in range(0, len(rows), step)
    ]
    return np.concatenate(parts)


def _encoded(item: _Item, rows: np.ndarray) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise ValueError(f"the tensor {item.source!r} holds numbers that are not finite")
    if item.kind == BF16:
        return rows.astype(ml_dtypes.bfloat16).view(np.uint8)
    if item.kind == Q8_0:
        return quants.quantize(rows, Q8_0)
    with np.errstate(over="ignore"):
        narrow = rows.astype(_DTYPES[item.kind])
    if not np.isfinite(narrow).all():
        raise ValueError(
            f"the tensor {item.source!r} holds numbers above 65504, the largest of F16; write BF16 or F32"
        )
    return narrow

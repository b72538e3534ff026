"""GGUF files, the format of llama.cpp, as a `Checkpoint`: Hugging Face names, layouts and config.

A GGUF file is a header (metadata and a table of tensors) and the tensors' bytes. The header is
parsed here: `gguf.GGUFReader` makes an array object of every number and string of the vocabulary,
which took 4 s and 130 MB on SmolLM2-135M, where this takes 0.2 s and 10 MB. What the bytes of a
quantised tensor mean is left to `gguf.quants`.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from trainjax.io.tokenizer import from_gguf
from trainjax.tree import nearest
from trainjax.types import Blocks


@final
class GgufFile:
    """A GGUF file as a `Checkpoint`, read one tensor at a time.

    Quantised tensors come as float32, F32 and F16 ones as they are, BF16 as `ml_dtypes.bfloat16`.
    Only the config and the table of tensors stay in memory: `read` maps its tensor's bytes alone,
    and unmaps them.

    >>> GgufFile("model.gguf").config["hidden_size"]  # doctest: +SKIP
    576

    Raises:
        ValueError: not a GGUF file, a damaged one, or a model that cannot be said in the terms of
            `transformers`; the message names the path and the reason.
    """

    config: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        header = read_header(self._path)
        try:
            self._architecture = _architecture(header.metadata)
            self._tensors = _by_hf_name(header.tensors, self._architecture.names)
            self.config = self._architecture.config(
                header.metadata, header.tensors, lambda name: self._load(name, header.tensors[name])
            )
        except ValueError as error:
            raise ValueError(f"{self._path} cannot be used: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by Hugging Face name, rows (out) first, without reading the tensors."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, an array of its own in the layout of `transformers`.

        Raises:
            KeyError: no tensor has that name; the message suggests the nearest.
            ValueError: the tensor's type is not supported; the message names both.
        """
        values = self._load(name, self._found(name))
        order = self._architecture.rows(name, len(values), self.config)
        return values if order is None else values[order]

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives the tensor's numbers as."""
        kind = self._tensors[name].type
        return np.dtype(next((_DTYPES[known] for known in _DTYPES if known == kind), np.float32))

    def parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The tensor a few rows at a time; all of it is in memory meanwhile."""
        values = self.read(name)
        for start in range(0, len(values), rows):
            yield values[start : start + rows]

    def blocks(self, name: str) -> Blocks | None:
        """One matrix as the file has it, its rows in the order of `transformers`; None if not in blocks.

        Raises:
            KeyError: no tensor has that name; the message suggests the nearest.
        """
        tensor = self._found(name)
        size, num_bytes = _block(tensor.type)
        if size == 1 or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        data = np.array(self._bytes(tensor)).reshape(rows, columns // size, num_bytes)
        order = self._architecture.rows(name, rows, self.config)
        return Blocks(data if order is None else data[order], _type_name(tensor.type))

    def tokenizer(self) -> Any | None:
        """The `PreTrainedTokenizerFast` with its chat template; None where there is no vocabulary.

        Reads the header anew: that is quick, and the vocabulary need not stay in memory.
        """
        metadata = read_header(self._path).metadata
        return from_gguf(metadata) if "tokenizer.ggml.tokens" in metadata else None

    def _load(self, name: str, tensor: Tensor) -> np.ndarray:
        if tensor.type not in _SUPPORTED:
            raise ValueError(
                f"tensor {name!r} of {self._path} has the type {_type_name(tensor.type)}; the "
                f"types that can be read are {', '.join(kind.name for kind in _SUPPORTED)}"
            )
        kind = GGMLQuantizationType(tensor.type)
        return _dequantise(self._bytes(tensor), kind).reshape(tensor.shape)

    def _bytes(self, tensor: Tensor) -> np.ndarray:
        return np.memmap(self._path, np.uint8, "r", tensor.offset, (_num_bytes(tensor),))

    def _found(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"{self._path} has no tensor {name!r}{nearest(name, self._tensors)}")
        return self._tensors[name]


# --- the header ---------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """One line of the table of tensors.

    Attributes:
        shape: rows first, as in NumPy; the file has it reversed.
        type: the number of the `GGMLQuantizationType`, which may be one unknown to `gguf`.
        offset: of the first byte, from the start of the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


class Header(NamedTuple):
    """What a GGUF file says before its tensors' bytes.

    Attributes:
        metadata: plain Python values by key; arrays are lists.
        tensors: by the file's own names.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The metadata and the table of tensors of a GGUF file, versions 2 and 3, little-endian.

    Raises:
        ValueError: not a GGUF file, or one that ends before its header or its tensors do.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
        try:
            return _header(_Cursor(file, end=path.stat().st_size))
        except ValueError as error:
            raise ValueError(f"{path} is not a GGUF file that can be read: {error}") from error


def _header(cursor: _Cursor) -> Header:
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, where 2 or 3 (little-endian) is supported")
    count, keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(keys)}
    table = {cursor.string(): cursor.tensor() for _ in range(count)}
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r} is not a number of bytes")
    start = -(-cursor.position() // alignment) * alignment
    tensors = {
        name: tensor._replace(offset=start + tensor.offset) for name, tensor in table.items()
    }
    for name, tensor in tensors.items():
        if tensor.shape[-1] % _block(tensor.type)[0]:
            raise ValueError(f"a row of tensor {name!r}, shape {tensor.shape}, is not whole blocks")
        if tensor.offset + _num_bytes(tensor) > cursor.end:
            raise ValueError(f"it ends before the bytes of tensor {name!r} do")
    return Header(metadata, tensors)


_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The codes of `struct` by the number that GGUF has for a type."""

_STRING, _ARRAY = 8, 9


class _Cursor:
    """Reads the parts of a header one after another, and never past the file's end."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self.end = end

    def position(self) -> int:
        return self._file.tell()

    def take(self, size: int) -> bytes:
        # Checked before reading: a damaged length would ask for more memory than there is.
        if size > self.end - self.position():
            raise ValueError(f"it ends at byte {self.end}, inside its header")
        return self._file.read(size)

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            if item == _STRING:
                return [self.string() for _ in range(length)]
            return list(self.scalars(_code(item), length))
        return self.scalar(_code(kind))

    def tensor(self) -> Tensor:
        shape = tuple(reversed(self.scalars("Q", self.scalar("I"))))
        return Tensor(shape or (1,), self.scalar("I"), self.scalar("Q"))


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return _SCALARS[kind]


# --- tensors ------------------------------------------------------------------------------------

_SUPPORTED = [
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
]
_DTYPES: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}
_CHUNK = 1 << 18
"""Numbers dequantised at a time: `gguf.quants` makes several arrays as large as what it gets."""


def _dequantise(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers, one-dimensional, that the bytes of a tensor stand for."""
    if kind in _DTYPES:
        return np.array(raw).view(_DTYPES[kind])
    block, size = GGML_QUANT_SIZES[kind]
    values = np.empty(len(raw) // size * block, np.float32)
    blocks = _CHUNK // block
    for first in range(0, len(raw) // size, blocks):
        # One row of many blocks: `dequantize` loops in Python over rows.
        part = np.asarray(raw[first * size : (first + blocks) * size])
        values[first * block : (first + blocks) * block] = quants.dequantize(part[None], kind)[0]
    return values


def _num_bytes(tensor: Tensor) -> int:
    """The tensor's size in the file; 0 where its type is unknown."""
    block, size = _block(tensor.type)
    return math.prod(tensor.shape) // block * size


def _block(kind: int) -> tuple[int, int]:
    """How many numbers a block of the type holds in how many bytes; (1, 0) for an unknown type."""
    return next((sizes for known, sizes in GGML_QUANT_SIZES.items() if known == kind), (1, 0))


def _type_name(kind: int) -> str:
    return next((known.name for known in GGMLQuantizationType if known == kind), f"number {kind}")


# --- architectures ------------------------------------------------------------------------------


class _Architecture(NamedTuple):
    """How a `general.architecture` of llama.cpp is said in the terms of `transformers`.

    Attributes:
        config: `(metadata, tensors, read) -> config.json`, all by the file's own names.
        names: the modules' names here and there, `{}` for the layer; None drops the tensor.
        rows: `(Hugging Face name, number of rows, config) -> order`: the rows in the order of
            `transformers`, or None where they are in that order.
    """

    config: Callable[[Mapping[str, Any], Mapping[str, Tensor], Callable], dict[str, Any]]
    names: Mapping[str, str | None]
    rows: Callable[[str, int, Mapping[str, Any]], np.ndarray | None]


def _architecture(metadata: Mapping[str, Any]) -> _Architecture:
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(f"its general.architecture is {name!r}; the supported are: {supported}")
    return _ARCHITECTURES[name]


def _by_hf_name(
    tensors: Mapping[str, Tensor], names: Mapping[str, str | None]
) -> dict[str, Tensor]:
    renamed = {_hf_name(name, names): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def _hf_name(name: str, names: Mapping[str, str | None]) -> str | None:
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    known = f"blk.{{}}.{module[layer.end() :]}" if layer else module
    if known not in names or kind not in ("weight", "bias"):
        raise ValueError(f"its tensor {name!r} has no counterpart in the model of transformers")
    target = names[known]
    return target and f"{target.format(*layer.groups() if layer else ())}.{kind}"


def _config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    kind = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ValueError(f"its metadata lacks {kind}.{key}")
        if isinstance(value, list) and len(set(value)) != 1:
            raise ValueError(
                f"{kind}.{key}={value} differs by layer; one value for all is supported"
            )
        return value[0] if isinstance(value, list) else value

    if get("expert_count", 0):
        raise ValueError(
            f"{kind}.expert_count={get('expert_count')}; only dense models are supported"
        )
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ValueError(f"{kind}.{key}={get(key)} is not the width of a head, {head_dim}")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no tensor token_embd.weight")
    theta = _decimal(get("rope.freq_base", 10000.0))
    factors = read("rope_freqs.weight") if "rope_freqs.weight" in tensors else None
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(kind, metadata, factors, theta),
        "max_position_embeddings": get("context_length"),
        # Not llama.vocab_size, which need not count the rows that pad the embedding.
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(re.search(r"\.attn_\w+\.bias$", name) for name in tensors),
        "mlp_bias": any(re.search(r"\.ffn_\w+\.bias$", name) for name in tensors),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    architecture: str, metadata: Mapping[str, Any], factors: np.ndarray | None, theta: float
) -> dict[str, Any] | None:
    # As in llama.cpp: a factor without a type is linear, and 0 or 1 is none.
    prefix = f"{architecture}.rope"
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    legacy = metadata.get(f"{prefix}.scale_linear", 1.0)
    factor = _decimal(metadata.get(f"{prefix}.scaling.factor", legacy))
    if kind not in ("none", "linear"):
        raise ValueError(f"{prefix}.scaling.type={kind!r} is not supported; none and linear are")
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if factors is None or np.all(factors == 1):
        return {"rope_type": "linear", "factor": factor} if linear else None
    if linear:
        raise ValueError(
            "it scales its rotary frequencies twice, by rope_freqs.weight and linearly"
        )
    return _llama3_scaling(factors.astype(np.float64), theta)


def _llama3_scaling(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The `rope_scaling` that divides the rotary frequencies by `factors`, shape `[head_dim / 2]`.

    The converter of llama.cpp keeps of Llama 3's four numbers only what they do to the wavelength
    `w = 2π·theta^(2i/head_dim)` of each frequency: `llama3_factors`. From these:

    - `factor` is the largest;
    - where a factor lies between 1 and `factor`, `smooth` follows from it, and it is a line in 1/w
      with slope `L / (high - low)` and intercept `-low / (high - low)`.

    Two equations for the three numbers L, low and high: they count only by their ratios, so low = 1
    is no loss. Fewer than two factors in between leave the line open; then the numbers of every
    published Llama 3 are tried. The result is checked against all factors.
    """
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    guesses = [(4.0, 8192)]
    between = (factors > 1) & (factors < factor)
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(1 / wavelengths[between], smooth, 1)
        if intercept < 0 < slope:
            guesses.append((round(1 - 1 / float(intercept), 3), round(-slope / intercept)))
    for high, length in guesses:
        # The file holds float32 computed in float32.
        if np.allclose(
            factors, llama3_factors(wavelengths, factor, high, float(length)), rtol=1e-5
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise ValueError("its rope_freqs.weight is not the scaling of Llama 3, the only one supported")


def llama3_factors(
    wavelengths: np.ndarray, factor: float, high: float, length: float
) -> np.ndarray:
    """1 below the wavelength `length / high`, `factor` above `length`, smooth between the two."""
    smooth = np.clip((length / wavelengths - 1) / (high - 1), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def llama_rows(name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
    """The order that undoes llama.cpp's, for the rows of the queries and keys.

    llama.cpp rotates neighbours (0, 1), (2, 3), ... of a head, transformers halves (0, d/2), ...
    """
    module = name.split(".")[-2]
    if module not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads" if module == "q_proj" else "num_key_value_heads"]
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": None,  # said by config["rope_scaling"]
}

_ARCHITECTURES = {
    # Llama 2 and 3, SmolLM, Mistral.
    "llama": _Architecture(config=_config, names=LLAMA_NAMES, rows=llama_rows),
    # Qwen2 and Qwen2.5, whose halves llama.cpp rotates as transformers does.
    "qwen2": _Architecture(config=_config, names=LLAMA_NAMES, rows=lambda *_: None),
}

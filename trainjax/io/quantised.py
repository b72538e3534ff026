"""Weights that a library has quantised: FP8 is read as the numbers it stands for, others are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import ml_dtypes
import numpy as np

from trainjax.io.folder import HfFolder
from trainjax.types import Blocks

_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
)  # for products of FP8 by FP8, which are not here
_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: floats of eight bits


def readable(files: HfFolder) -> HfFolder | Fp8Folder:
    """The folder, as its numbers if it is of FP8."""
    settings = files.config.get("quantization_config") or {}
    method = settings.get("quant_method")
    is_fp8 = method in ("fp8", "fbgemm_fp8") or (
        method == "compressed-tensors" and settings.get("format") in _FORMATS
    )
    return Fp8Folder(files) if is_fp8 else files


def refuse(source: str, config: Mapping[str, Any]) -> None:
    """Says what is to be done about weights that were quantised by another library.

    Raises:
        ValueError: naming the library and its bits, where `quantization_config` says that there is one.
    """
    if settings := config.get("quantization_config"):
        raise ValueError(
            f"{source} is quantised already by {_named(settings)}, whose codes are not read here; give the "
            "original weights, which formats of trainjax.quant (--base-format) quantise while they are loaded"
        )


def _named(settings: Mapping[str, Any]) -> str:
    """The method of a `quantization_config` as people call it: `bitsandbytes (4 bits, nf4)`."""
    four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    bits = settings.get("bits") or (4 if four else 8 if eight else None)
    kind = settings.get("bnb_4bit_quant_type") if four else settings.get("format")
    more = ", ".join(str(word) for word in (bits and f"{bits} bits", kind) if word)
    method = settings.get("quant_method", "a library that it does not name")
    return f"{method} ({more})" if more else str(method)


@final
class Fp8Folder:
    """A folder of FP8 weights as a `Checkpoint` of the numbers that they stand for, in config.json's dtype.

    `w = codes * scale`, with `weight_scale_inv` or `weight_scale` for the tensor, for each output or for each
    block of `weight_block_size` (the last of a side may be smaller). Scales of activations are left out:
    products are of the weights' numbers.

    Source: agrees with transformers 5, `FP8Linear` of `FineGrainedFP8Config(dequantize=True)`, where it reads
    DeepSeek's and Qwen's blocks.

    Raises:
        ValueError: on reading, codes without a scale, or a scale that does not fit them.
    """

    config: dict[str, Any]

    def __init__(self, files: HfFolder) -> None:
        self._files = files
        self._block = files.config["quantization_config"].get("weight_block_size")
        self.config = {k: v for k, v in files.config.items() if k != "quantization_config"}
        named = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        self._dtype = np.dtype(getattr(ml_dtypes, named, named))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors by name, without scales."""
        all_ = self._files.shapes()
        scales = {f"{name}{end}" for name in all_ for end in _SCALES}
        return {
            name: shape
            for name, shape in all_.items()
            if name not in scales and not name.endswith(_OF_ACTIVATIONS)
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor's numbers."""
        if not self._files.kind(name).startswith("F8"):
            return self._files.read(name)
        shapes = self._files.shapes()
        scale = next((f"{name}{end}" for end in _SCALES if f"{name}{end}" in shapes), None)
        if scale is None:
            raise ValueError(f"{name} is of FP8, and there is no {name}_scale for its codes")
        codes = self._files.codes(name).astype(np.float32)
        numbers = codes * self._spread(scale, codes.shape)
        return numbers.astype(self._dtype)

    def _spread(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A scale for each code, or one that is broadcast."""
        is_codes = self._files.kind(name).startswith("F8")  # powers of two, e8m0
        scale = self._files.codes(name) if is_codes else self._files.read(name)
        scale = scale.astype(np.float32)
        if scale.size == 1 or scale.shape == (shape[0], 1):
            return scale.reshape(scale.shape if scale.size > 1 else ())
        down, across = self._block or (1, 1)
        rows, columns = shape
        if scale.shape != (-(-rows // down), -(-columns // across)):
            raise ValueError(
                f"{name} {scale.shape} does not fit codes of {shape} in blocks (weight_block_size) of "
                f"{self._block}"
            )
        return np.repeat(np.repeat(scale, down, 0)[:rows], across, 1)[:, :columns]

    def blocks(self, name: str) -> Blocks | None:
        return None

    def tokenizer(self) -> Any | None:
        return self._files.tokenizer()

    def generation(self) -> dict[str, Any]:
        """As `HfFolder.generation`."""
        return self._files.generation()

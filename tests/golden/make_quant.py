"""Makes quant.npz: matrices as bitsandbytes, qwix and gguf quantise them.

    pip install torch==2.13.0 bitsandbytes==0.50.2 qwix==0.1.8 gguf
    PYTHONPATH=. python tests/golden/make_quant.py

Inputs are those of `tests.quant.matrices`, drawn by numpy from a seed. Of NF4 there are codes and scales,
and for the large matrix, whose scales are quantised too, a checksum of the codes. bitsandbytes has three
kernels for the eight-bit codes of scales: for GPUs, for float32 on CPU (it looks the nearest entry up in a
coarse grid, which misses it for 1 in 700 numbers), and for float64 on CPU, which compares all entries. The
last is taken; `double/codes_float32` has what the second gives. Numbers of NF4 come from its portable kernel:
that for CPU returns others where 64 does not divide a row.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import zlib
from pathlib import Path

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import numpy as np
import qwix
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from gguf import GGMLQuantizationType, quants

from tests.quant.matrices import NF4_CASES, large, matrix

OUT = Path(__file__).with_name("quant.npz")
PACKAGES = ("torch", "bitsandbytes", "qwix", "jax", "gguf", "numpy")


def nf4(name: str, w: np.ndarray) -> dict[str, np.ndarray]:
    codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4")
    table = _get_4bit_code("nf4", "cpu")
    shape = torch.from_numpy(w).shape
    back = _dequantize_4bit_compute(
        codes.reshape(-1), state.absmax, table, 64, shape, torch.float32
    )
    return {
        f"nf4/{name}/codes": codes.numpy().ravel(),
        f"nf4/{name}/scales": state.absmax.numpy(),
        f"nf4/{name}/dense": back.numpy(),
    }


def double() -> dict[str, np.ndarray]:
    w = torch.from_numpy(large())
    codes, single = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    kernel, table = torch.ops.bitsandbytes.quantize_blockwise.default, bnb.create_dynamic_map()
    exact, outer = kernel((single.absmax - state.offset).double(), table, 256)
    back = bnb.dequantize_4bit(codes, state)
    error = (back - w).abs()
    return {
        "double/checksum": np.uint32(zlib.crc32(codes.numpy().tobytes())),
        "double/map": table.numpy(),
        "double/codes": exact.numpy(),
        "double/codes_float32": state.absmax.numpy(),
        "double/outer": outer.numpy(),
        "double/offset": state.offset.numpy(),
        "double/mean_error": error.mean().numpy(),
        "double/relative_error": (error / w.abs()).mean().numpy(),
    }


def eight_bits() -> dict[str, np.ndarray]:
    w = matrix(*NF4_CASES["rows"])
    codes, largest, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w).half())
    found = {"int8/codes": codes.numpy(), "int8/largest": largest.numpy()}
    for name, axes in (("output", [0]), ("tensor", [])):
        made = qwix.quantize(jnp.asarray(w), jnp.float8_e4m3fn, channelwise_axes=axes)
        found[f"fp8/{name}/codes"] = np.asarray(made.qvalue).view(np.uint8)
        found[f"fp8/{name}/scales"] = np.asarray(made.scale)
    for name in ("Q8_0", "Q4_1"):
        kind = GGMLQuantizationType[name]
        raw = quants.quantize(w, kind)
        found |= {f"{name}/bytes": raw, f"{name}/dense": quants.dequantize(raw, kind)}
    return found


def main() -> None:
    found: dict[str, np.ndarray] = {}
    for name, shape in NF4_CASES.items():
        found |= nf4(name, matrix(*shape))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = json.dumps(
        versions | {"python": platform.python_version(), "script": Path(__file__).name}
    )
    np.savez_compressed(OUT, about=np.array(about), **found, **double(), **eight_bits())


if __name__ == "__main__":
    main()

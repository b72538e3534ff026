"""Models that another library quantised: FP8 is read as its numbers, codes are never taken for weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trainjax import quant, tree
from trainjax.models import load

FP8 = ml_dtypes.float8_e4m3fn
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of a folder, to be quantised."""
    return Path(shutil.copytree(golden / "llama_grouped", tmp_path / "model"))


def changed(folder: Path, change: Callable[[dict], None], **settings) -> Path:
    """The folder with other tensors, and a `quantization_config` if there are settings."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_blocks(size: tuple[int, int]) -> Callable[[dict], None]:
    """Every matrix of the layers as codes and as many scales as there are blocks, rest included."""

    def change(tensors: dict) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            w = tensors[name]
            grid = [-(-side // n) for side, n in zip(w.shape, size, strict=True)]
            scales = np.random.default_rng([*name.encode()]).uniform(0.01, 0.02, grid)
            tensors[f"{name}_scale_inv"] = scales.astype(np.float32)
            tensors[name] = (w / spread(scales, size, w.shape)).astype(FP8)

    return change


def spread(scales: np.ndarray, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """By its definition: code `i, j` has the scale of block `i // rows, j // columns`."""
    return np.asarray(
        [[scales[i // size[0], j // size[1]] for j in range(shape[1])] for i in range(shape[0])]
    )


def test_blocks_of_fp8_are_read_as_codes_times_the_scale_of_their_block(folder):
    """Neither 10 nor 7 divides a side."""
    size = (10, 7)
    changed(folder, in_blocks(size), quant_method="fp8", weight_block_size=list(size))
    # NumPy's reader has no 8-bit floats: the file's own header says where they are.
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[UP]
    start, end = entry["data_offsets"]
    codes = np.frombuffer(raw[8 + length + start : 8 + length + end], FP8).reshape(entry["shape"])
    scales = np.random.default_rng([*UP.encode()]).uniform(0.01, 0.02, (3, 3)).astype(np.float32)
    expected = codes.astype(np.float32) * spread(scales, size, codes.shape).astype(np.float32)
    model = load(folder)
    np.testing.assert_array_equal(model.params["layers"]["mlp"]["up"]["kernel"][0], expected.T)
    assert "quantization_config" not in model.hf
    assert {leaf.dtype for leaf in tree.flatten(model.params).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("shape", [(), (1,), (24, 1)], ids=str)
def test_a_scale_may_be_of_a_tensor_or_of_an_output(folder, shape):
    scale = np.full(shape, 0.5, np.float32)

    def change(tensors):
        tensors[UP] = np.full(tensors[UP].shape, 3, FP8)
        tensors[f"{UP}_scale"] = scale

    changed(folder, change, quant_method="compressed-tensors", format="float-quantized")
    assert np.all(load(folder).params["layers"]["mlp"]["up"]["kernel"][0] == 1.5)


def test_fp8_may_be_quantised_anew(folder):
    changed(folder, in_blocks((8, 8)), quant_method="fp8", weight_block_size=[8, 8])
    model = load(folder, quantise=quant.int8())
    assert isinstance(model.params["layers"]["mlp"]["up"]["kernel"], quant.Int8)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (NF4, r"bitsandbytes \(4 bits, nf4\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes \(8 bits\)"),
        ({"quant_method": "gptq", "bits": 4}, r"gptq \(4 bits\)"),
        ({"quant_method": "awq", "bits": 4}, r"awq \(4 bits\)"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"compressed-tensors \(pack-quantized\)",
        ),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_what_another_library_quantised_is_named_with_what_to_do(folder, settings, name):
    changed(folder, lambda tensors: None, **settings)
    with pytest.raises(ValueError, match=f"quantised already by {name}, .* original weights"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda t: t.update({UP: t[UP].astype(np.int8)}),
            {},
            "up_proj.weight is stored as I8: codes of a quantised model",
        ),
        (
            lambda t: t.update({UP: t[UP].astype(FP8)}),
            {},
            "up_proj.weight is stored as F8_E4M3: codes",
        ),
        (
            lambda t: t.update({UP: t[UP].astype(FP8)}),
            {"quant_method": "fp8"},
            "up_proj.weight is of FP8, and there is no .*up_proj.weight_scale",
        ),
        (
            lambda t: t.update(
                {UP: t[UP].astype(FP8), f"{UP}_scale_inv": np.ones((2, 2), np.float32)}
            ),
            {"quant_method": "fp8", "weight_block_size": [16, 16]},
            r"scale_inv \(2, 2\) does not fit codes of \(24, 16\)",
        ),
        (
            lambda t: t.update({f"{UP}.absmax": np.ones(3, np.float32)}),
            {},
            "holds 'model.layers.0.mlp.up_proj.weight.absmax'",
        ),
    ],
    ids=["int8", "fp8", "no scale", "another grid", "leftover"],
)
def test_codes_are_not_taken_for_weights(folder, change, settings, message):
    with pytest.raises(ValueError, match=message):
        load(changed(folder, change, **settings))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_logits_of_fp8_are_those_of_transformers(folder):
    import torch
    import transformers

    changed(
        folder,
        in_blocks((8, 8)),
        quant_method="fp8",
        weight_block_size=[8, 8],
        activation_scheme="dynamic",
    )
    tokens = np.arange(1, 12)[None]
    config = transformers.FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(load(folder).logits(tokens), expected, rtol=0, atol=1e-4)

"""GGUF files that are written: by the definition of each type, by their own reader, and by ours."""

from __future__ import annotations

import logging
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.numpy import save_file

from tests import families
from trainjax.io import folder
from trainjax.io.gguf import GgufFile, read_header
from trainjax.io.gguf_write import BF16, F16, F32, Q8_0, write

KINDS = {"F32": F32, "F16": F16, "BF16": BF16, "Q8_0": Q8_0}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2 = LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "attention_bias": True,
}
CONFIGS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "biased": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "wide heads": LLAMA | {"head_dim": 32},
    "llama3": LLAMA | {"head_dim": 64, "rope_scaling": LLAMA3},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "qwen2": QWEN2,
}


class Model:
    """A `Checkpoint` of random numbers, which counts what it is asked for."""

    def __init__(self, config: dict[str, Any], tokenizer: Any = None, std: float = 1.0) -> None:
        self.config = config
        self.std = std
        self.changes: dict[str, np.ndarray] = {}
        self._tokenizer = tokenizer

    def blocks(self, name: str) -> None:
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hf, hidden = self.config, self.config["hidden_size"]
        q = hf["num_attention_heads"] * hf["head_dim"]
        kv = hf["num_key_value_heads"] * hf["head_dim"]
        parts = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (hf["intermediate_size"], hidden),
            "mlp.up_proj": (hf["intermediate_size"], hidden),
            "mlp.down_proj": (hidden, hf["intermediate_size"]),
        }
        biased = [
            part
            for part in parts
            if hf["mlp_bias" if "mlp" in part else "attention_bias"]
            and not (hf["model_type"] == "qwen2" and "o_proj" in part)
        ]
        shapes = {"model.embed_tokens.weight": (hf["vocab_size"], hidden)}
        for layer in range(hf["num_hidden_layers"]):
            module = f"model.layers.{layer}"
            shapes |= {f"{module}.{part}.weight": shape for part, shape in parts.items()}
            shapes |= {f"{module}.{part}.bias": parts[part][:1] for part in biased}
            shapes |= {
                f"{module}.{norm}_layernorm.weight": (hidden,)
                for norm in ("input", "post_attention")
            }
        shapes["model.norm.weight"] = (hidden,)
        if not hf["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (hf["vocab_size"], hidden)
        return shapes | {name: value.shape for name, value in self.changes.items()}

    def read(self, name: str) -> np.ndarray:
        if name in self.changes:
            return self.changes[name]
        rng = np.random.default_rng([*name.encode()])
        return np.float32(self.std) * rng.standard_normal(self.shapes()[name], np.float32)

    def tokenizer(self) -> Any | None:
        return self._tokenizer


def written(path: Path, config: dict[str, Any] = LLAMA, kind: Any = F32) -> Path:
    write(path / "m.gguf", Model(config), kind)
    return path / "m.gguf"


# --- what is read back --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tensors_are_read_back_as_their_type_holds_them(tmp_path, config, kind):
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    model, file = Model(config), GgufFile(written(tmp_path, config, KINDS[kind]))
    assert file.shapes() == model.shapes()
    for name, shape in model.shapes().items():
        expected = model.read(name).astype(dtype if len(shape) > 1 else np.float32)
        found = file.read(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8), name)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_config_is_read_back_as_it_was(tmp_path, config, kind):
    assert GgufFile(written(tmp_path, config, KINDS[kind])).config == config


def test_settings_that_a_config_leaves_out_are_those_of_transformers(tmp_path):
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    model = Model(LLAMA | {"num_key_value_heads": 4})
    shapes = model.shapes()
    model.config = {key: value for key, value in LLAMA.items() if key not in left_out}
    model.shapes = lambda: shapes
    write(tmp_path / "m.gguf", model, F16)
    found = GgufFile(tmp_path / "m.gguf").config
    assert found == LLAMA | {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }


def test_rotary_settings_of_transformers_5_are_read_too(tmp_path):
    new = LLAMA | {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    found = GgufFile(written(tmp_path, new)).config
    assert (found["rope_theta"], found["rope_scaling"]) == (10000.0, LLAMA3)


def test_only_the_ratios_of_llama3s_numbers_count(tmp_path):
    scaled = {"low_freq_factor": 2.0, "high_freq_factor": 8.0}
    scaling = LLAMA3 | scaled | {"original_max_position_embeddings": 16384}
    found = GgufFile(written(tmp_path, LLAMA | {"head_dim": 64, "rope_scaling": scaling}))
    assert found.config["rope_scaling"] == LLAMA3


# --- the bytes ----------------------------------------------------------------------------------


def raw(path: Path, name: str) -> np.ndarray:
    """A tensor's bytes as the format's own library finds them."""
    return next(np.asarray(t.data) for t in GGUFReader(path).tensors if t.name == name)


def q8_0(values: np.ndarray) -> np.ndarray:
    """By ggml-quants.c (quantize_row_q8_0_ref): float32 scale and reciprocal, halves away from zero."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, 1), 0)
    products = blocks * inverse[:, None].astype(np.float32)
    codes = np.sign(products) * np.floor(np.abs(products).astype(np.float64) + 0.5)
    scales = scale.astype(np.float16)[:, None].view(np.uint8)
    return np.hstack([scales, codes.astype(np.int8).view(np.uint8)]).reshape(len(values), -1)


def test_q8_0_is_what_ggml_makes_of_the_numbers(tmp_path):
    model = Model(LLAMA)
    path = written(tmp_path, LLAMA, Q8_0)
    for name, ours in {
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "lm_head": "output",
    }.items():
        expected = q8_0(model.read(f"{name}.weight"))
        np.testing.assert_array_equal(raw(path, f"{ours}.weight"), expected)


def test_q8_0_is_within_half_a_step_of_each_number(tmp_path):
    model, file = Model(LLAMA), GgufFile(written(tmp_path, LLAMA, Q8_0))
    name = "model.layers.0.self_attn.q_proj.weight"
    values, found = (x.read(name).reshape(-1, 32) for x in (model, file))
    largest = np.abs(values).max(axis=1, keepdims=True)
    # Half a step, and of the largest 127 steps what float16 (11 bits) rounds of each.
    assert np.all(np.abs(found - values) <= largest / 127 * (0.5 + 127 * 2.0**-11) * (1 + 1e-5))
    assert np.any(found != values)


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    path = written(tmp_path, LLAMA | {"intermediate_size": 80}, Q8_0)
    types = {name: tensor.type for name, tensor in read_header(path).tensors.items()}
    assert types["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert types["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    name = "model.layers.0.mlp.down_proj.weight"
    model = Model(LLAMA | {"intermediate_size": 80})
    np.testing.assert_array_equal(GgufFile(path).read(name), model.read(name).astype(np.float16))


def test_queries_and_keys_are_in_llama_cpps_order(tmp_path):
    """As `LlamaModel.permute` of llama.cpp's converter; its Qwen2 keeps them in order."""
    for config, moved in ((CONFIGS["biased"], True), (QWEN2, False)):
        path = tmp_path / config["model_type"]
        path.mkdir()
        file = written(path, config)
        for part, heads in {"q": 4, "k": 2}.items():
            for kind in ("weight", "bias"):
                values = Model(config).read(f"model.layers.0.self_attn.{part}_proj.{kind}")
                halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
                expected = halves.swapaxes(1, 2).reshape(values.shape) if moved else values
                np.testing.assert_array_equal(raw(file, f"blk.0.attn_{part}.{kind}"), expected)


def test_large_tensors_are_converted_in_parts_to_the_same_bytes(tmp_path, monkeypatch):
    whole = written(tmp_path, LLAMA, Q8_0).read_bytes()
    monkeypatch.setattr("trainjax.io.gguf_write._CHUNK", 200)
    (tmp_path / "parts").mkdir()
    assert written(tmp_path / "parts", LLAMA, Q8_0).read_bytes() == whole


def test_the_librarys_reader_finds_every_tensor_and_setting(tmp_path):
    reader = GGUFReader(written(tmp_path, CONFIGS["llama3"], F16))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.vocab_size": 24,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert expected.items() <= fields.items()
    assert len(reader.tensors) == len(Model(CONFIGS["llama3"]).shapes()) + 1
    assert reader.tensors[0].name == "rope_freqs.weight"


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    model = Model(LLAMA | {"vocab_size": 1 << 14, "num_hidden_layers": 1})
    sizes = [4 * math.prod(shape) for shape in model.shapes().values()]
    tracemalloc.start()
    write(tmp_path / "m.gguf", model, F16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The tensor, its copy in the order and type of the file, and parts of it in between.
    assert sum(sizes) > 1.9 * max(sizes)
    assert peak < 3.2 * max(sizes)


# --- what cannot be written ---------------------------------------------------------------------

UNWRITABLE = {
    "family": (
        {"model_type": "gemma"},
        {},
        "model_type='gemma' cannot be written as GGUF; llama, ",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, {}, "weights are quantised"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
    "window": ({"use_sliding_window": True}, {}, "use_sliding_window=true"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}, "'yarn'.*llama3 can"),
    "reward": ({}, {"score.weight": np.ones((1, 64))}, "reward model cannot be written"),
    "unknown": ({}, {"model.layers.0.mlp.extra.weight": np.ones((2, 2))}, "mlp.extra.weight'"),
    "layers": ({}, {"model.layers.0.q_norm.weight": np.ones(2)}, "q_norm.weight' has no place"),
    "nan": ({}, {"model.norm.weight": np.full(64, np.nan)}, "'model.norm.weight'.*not finite"),
    "large": ({}, {"lm_head.weight": np.full((24, 64), 7e4)}, "lm_head.*above 65504.*write BF16"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, config, tensors, message):
    model = Model(LLAMA | config)
    model.changes = {name: values.astype(np.float32) for name, values in tensors.items()}
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "m.gguf", model, F16)
    assert not list(tmp_path.iterdir())


def test_a_missing_tensor_is_named(tmp_path):
    model = Model(LLAMA)
    shapes = model.shapes()
    shapes.pop("model.layers.1.mlp.up_proj.weight")
    model.shapes = lambda: shapes
    with pytest.raises(ValueError, match=r"has no 'model.layers.1.mlp.up_proj.weight' \(1 tens"):
        write(tmp_path / "m.gguf", model, F16)


def test_a_file_is_not_written_over(tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists already; give the name of a new file"):
        write(tmp_path / "m.gguf", Model(LLAMA), F16)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_type_that_is_not_written_is_named():
    with pytest.raises(ValueError, match="Q4_K cannot be written; F32, F16, BF16, Q8_0 can"):
        write("m.gguf", Model(LLAMA), GGMLQuantizationType.Q4_K)


def test_a_sliding_window_is_warned_of(tmp_path, caplog):
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 128}
    with caplog.at_level(logging.WARNING):
        written(tmp_path, mistral, F16)
    assert "attends to the last 128 tokens" in caplog.text
    assert GgufFile(tmp_path / "m.gguf").config == LLAMA


def test_a_tied_head_in_the_checkpoint_and_old_buffers_are_passed_over(tmp_path):
    model = Model(CONFIGS["tied"])
    model.changes = {
        "lm_head.weight": np.ones((24, 64), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    write(tmp_path / "m.gguf", model, F16)
    assert GgufFile(tmp_path / "m.gguf").shapes() == Model(CONFIGS["tied"]).shapes()


# --- with transformers --------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["llama_grouped", "llama_one_kv_head", "qwen2"])
def test_transformers_reads_the_function_that_was_written(tmp_path, name):
    """It takes rows in llama.cpp's order back by itself."""
    import torch
    import transformers

    original = families.torch_model(name)
    config = original.config.to_dict() | {"rope_parameters": None, "rope_theta": 10000.0}
    tensors = {key: value.numpy() for key, value in original.state_dict().items()}
    save_file(
        {k: v for k, v in tensors.items() if k != "lm_head.weight" or name != "qwen2"},
        tmp_path / "model.safetensors",
    )
    folder.write_json(tmp_path / "config.json", config)
    write(tmp_path / "m.gguf", folder.HfFolder(tmp_path), F32)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), tensors[key], key)

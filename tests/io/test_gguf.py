"""GGUF files: types by their definition, llama.cpp's layout undone, config, damaged files."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter

from tests import helpers
from trainjax.io.gguf import GgufFile
from trainjax.io.gguf_header import read_header

# --- files --------------------------------------------------------------------------------------

HIDDEN, HEADS, KV_HEADS, MIDDLE, VOCAB = 256, 4, 2, 512, 24
HEAD_DIM = HIDDEN // HEADS
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (MIDDLE, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (MIDDLE, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, MIDDLE),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}
# As in gguf-py's constants.py and tensor_mapping.py.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": MIDDLE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)


def to_llama_cpp(name: str, values: np.ndarray) -> np.ndarray:
    """The rows as llama.cpp's converter puts them (convert_hf_to_gguf.py, LlamaModel.permute)."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(
    path: Path,
    metadata: dict | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    types: dict[str, GGMLQuantizationType] | None = None,
    architecture: str = "llama",
    **options,
) -> Path:
    """A GGUF file by the library's own writer. `metadata` adds to METADATA, None takes away."""
    writer = GGUFWriter(path, architecture, **options)
    for key, value in (METADATA | (metadata or {})).items():
        match value:
            case int() if key == "general.alignment":
                writer.add_custom_alignment(value)
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
            case list():
                writer.add_array(key, value)
    for name, values in (tensors if tensors is not None else EMBEDDING).items():
        writer.add_tensor(name, values, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBEDDING = {"token_embd.weight": random(VOCAB, HIDDEN)}


def model(shapes=SHAPES) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random tensors by Hugging Face name, and as llama.cpp has them."""
    ours = {name: random(*shape) for name, shape in shapes.items()}
    theirs = {}
    for name, values in ours.items():
        module, _, kind = name.rpartition(".")
        theirs[f"{GGUF_NAMES[module]}.{kind}"] = to_llama_cpp(name, values)
    return ours, theirs


# --- the types ----------------------------------------------------------------------------------


def half(block: np.ndarray, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def nibbles(packed: np.ndarray) -> np.ndarray:
    """The lower halves of all bytes, then the upper ones."""
    return np.concatenate([packed & 15, packed >> 4]).astype(np.int64)


def q8_0(block):
    return half(block, 0) * block[2:].view(np.int8).astype(np.int64)


def q4_0(block):
    return half(block, 0) * (nibbles(block[2:]) - 8)


def q4_1(block):
    return half(block, 0) * nibbles(block[4:]) + half(block, 2)


def q4_k(block):
    scales, packed = block[4:16].astype(int), block[16:].reshape(4, 32)
    values = []
    for j in range(8):
        if j < 4:
            scale, minimum = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            minimum = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        q = packed[j // 2] & 15 if j % 2 == 0 else packed[j // 2] >> 4
        values.append(half(block, 0) * scale * q.astype(int) - half(block, 2) * minimum)
    return np.concatenate(values)


def q6_k(block):
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8).astype(int), half(block, 208)
    values = np.empty(256)
    for n in range(2):
        for group in range(4):
            for i in range(32):
                bits = low[64 * n + 32 * (group % 2) + i] >> 4 * (group // 2) & 15
                bits |= (high[32 * n + i] >> 2 * group & 3) << 4
                scale = scales[8 * n + 2 * group + i // 16]
                values[128 * n + 32 * group + i] = d * scale * (bits - 32)
    return values


# By ggml-common.h (block_*) and ggml-quants.c (dequantize_row_*). In float64: the products are
# exact there, so that one rounding to float32 is what float32 arithmetic gives as well.
DEFINITIONS = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q4_K": q4_k, "Q6_K": q6_k}
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("rows", [1, 3, 2100])
def test_a_quantised_tensor_is_what_its_bytes_are_defined_to_mean(tmp_path, name, rows):
    kind = GGMLQuantizationType[name]
    size, width = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(rows)
    raw = rng.integers(0, 256, (rows * HIDDEN // size, width), np.uint8)
    for at in HALVES[name]:  # random bytes could be infinite
        raw[:, at : at + 2] = rng.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    data = raw.reshape(rows, -1)
    path = write(
        tmp_path / "m.gguf", tensors={"token_embd.weight": data}, types={"token_embd.weight": kind}
    )
    values = GgufFile(path).read("model.embed_tokens.weight")
    assert values.dtype == np.float32
    expected = np.array([DEFINITIONS[name](block) for block in raw]).reshape(rows, HIDDEN)
    np.testing.assert_array_equal(values, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_tensor_keeps_its_dtype_and_bits(tmp_path, dtype):
    values = random(VOCAB, HIDDEN).astype(dtype)
    types = {"token_embd.weight": GGMLQuantizationType.BF16} if dtype == ml_dtypes.bfloat16 else {}
    raw = values.view(np.uint8) if types else values
    path = write(tmp_path / "m.gguf", tensors={"token_embd.weight": raw}, types=types)
    read = GgufFile(path).read("model.embed_tokens.weight")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read.view(np.uint8), values.view(np.uint8))


def test_a_type_that_cannot_be_read_is_named_when_it_is_read(tmp_path):
    kind = GGMLQuantizationType.Q5_K
    block, size = GGML_QUANT_SIZES[kind]
    data = {"token_embd.weight": np.zeros((VOCAB, HIDDEN // block * size), np.uint8)}
    file = GgufFile(write(tmp_path / "m.gguf", tensors=data, types={"token_embd.weight": kind}))
    assert file.shapes() == {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' of .*Q5_K.*F32, F16, BF16"):
        file.read("model.embed_tokens.weight")


def test_reading_takes_little_more_memory_than_the_tensor(tmp_path):
    rows = 1 << 14
    data = np.zeros((rows, HIDDEN // 32 * 34), np.uint8)
    types = {"token_embd.weight": GGMLQuantizationType.Q8_0}
    file = GgufFile(write(tmp_path / "m.gguf", tensors={"token_embd.weight": data}, types=types))
    tracemalloc.start()
    values = file.read("model.embed_tokens.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * values.nbytes


def test_what_was_read_does_not_hold_on_to_the_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    values = GgufFile(path).read("model.embed_tokens.weight")
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(values, EMBEDDING["token_embd.weight"])


# --- names and layouts --------------------------------------------------------------------------


def test_names_shapes_and_values_are_those_of_transformers(tmp_path):
    ours, theirs = model()
    file = GgufFile(write(tmp_path / "m.gguf", tensors=theirs))
    assert file.shapes() == SHAPES
    for name, values in ours.items():
        np.testing.assert_array_equal(file.read(name), values, err_msg=name)


def test_biases_of_queries_and_keys_are_put_back_in_order_too(tmp_path):
    biases = {
        f"model.layers.0.self_attn.{name}_proj.bias": (rows,)
        for name, rows in {"q": HIDDEN, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}.items()
    }
    ours, theirs = model(SHAPES | biases)
    file = GgufFile(write(tmp_path / "m.gguf", tensors=theirs))
    for name in biases:
        np.testing.assert_array_equal(file.read(name), ours[name], err_msg=name)


def test_quantised_rows_are_put_back_in_order(tmp_path):
    name, kind = "model.layers.0.self_attn.q_proj.weight", GGMLQuantizationType.Q8_0
    raw = np.random.default_rng(0).integers(0, 100, (HIDDEN, HIDDEN // 32, 34), np.uint8)
    raw[..., :2] = np.float16([1]).view(np.uint8)
    values = raw[..., 2:].astype(np.float32).reshape(HIDDEN, HIDDEN)
    tensors = EMBEDDING | {"blk.0.attn_q.weight": to_llama_cpp(name, raw.reshape(HIDDEN, -1))}
    path = write(tmp_path / "m.gguf", tensors=tensors, types={"blk.0.attn_q.weight": kind})
    np.testing.assert_array_equal(GgufFile(path).read(name), values)


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    file = GgufFile(write(tmp_path / "m.gguf"))
    with pytest.raises(KeyError, match=r"did you mean 'model.embed_tokens.weight'"):
        file.read("model.embed_token.weight")


def test_a_tensor_without_a_counterpart_is_named(tmp_path):
    tensors = EMBEDDING | {"blk.0.attn_q_norm.weight": random(HEAD_DIM)}
    with pytest.raises(ValueError, match=r"m.gguf cannot be used.*'blk.0.attn_q_norm.weight'"):
        GgufFile(write(tmp_path / "m.gguf", tensors=tensors))


# --- the config ---------------------------------------------------------------------------------


def config(path: Path, metadata: dict | None = None, tensors: dict | None = None) -> dict:
    return GgufFile(write(path / "m.gguf", metadata, EMBEDDING | (tensors or {}))).config


def test_the_config_is_as_in_config_json(tmp_path):
    assert config(tmp_path, {"tokenizer.ggml.padding_token_id": 0}) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "vocab_size": 24,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.attention.head_count_kv": None}, {"num_key_value_heads": HEADS}),
        ({"llama.attention.head_count_kv": [2, 2]}, {"num_key_value_heads": 2}),
        ({"llama.attention.key_length": 128, "llama.rope.dimension_count": 128}, {"head_dim": 128}),
        ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"llama.vocab_size": 20}, {"vocab_size": VOCAB}),
        ({"tokenizer.ggml.bos_token_id": None}, {"bos_token_id": None}),
    ],
)
def test_the_config_follows_the_metadata(tmp_path, metadata, expected):
    found = config(tmp_path, metadata)
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("tensor", "key", "value"),
    [
        ("output.weight", "tie_word_embeddings", False),
        ("blk.0.attn_q.bias", "attention_bias", True),
        ("blk.0.attn_output.bias", "attention_bias", True),
        ("blk.0.ffn_up.bias", "mlp_bias", True),
    ],
)
def test_the_config_follows_the_tensors_that_exist(tmp_path, tensor, key, value):
    plain = config(tmp_path)
    found = config(tmp_path, tensors={tensor: random(HIDDEN)})
    assert {k: v for k, v in found.items() if v != plain[k]} == {key: value}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "its metadata lacks llama.block_count"),
        ({"llama.expert_count": 8}, "llama.expert_count=8; only dense models"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count=32 .* a head, 64"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length=32"),
        (
            {"llama.attention.head_count": [4, 8]},
            r"llama.attention.head_count=\[4, 8\] differs by layer",
        ),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    ],
)
def test_a_model_that_is_not_llama_as_in_transformers_is_refused(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=f"m.gguf cannot be used: {message}"):
        config(tmp_path, metadata)


def test_an_unknown_architecture_is_named_with_those_supported(tmp_path):
    path = write(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(
        ValueError, match="m.gguf cannot be used.*'mamba'.*the supported are: llama"
    ):
        GgufFile(path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"scale_linear": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
    ],
)
def test_linear_scaling_is_read(tmp_path, metadata, expected):
    metadata = {f"llama.rope.{key}": value for key, value in metadata.items()}
    assert config(tmp_path, metadata)["rope_scaling"] == expected


def rope_freqs(head_dim, theta, factor, low, high, length) -> np.ndarray:
    """As llama.cpp's converter writes it (LlamaModel.generate_extra_tensors), in float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    factors = []
    for frequency in 1.0 / np.float32(theta) ** exponents:
        wavelength = 2 * math.pi / float(frequency)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling", "found"),
    [
        # (factor, low, high, length) of Llama 3.1 and 3.2, whose heads are 128 and 64 wide.
        (128, 500000.0, (8.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192)),
        (64, 500000.0, (32.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)),
        # One frequency between: the numbers of Llama 3 are tried.
        (16, 10000.0, (8.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192)),
        # Others: found up to what they have in common, which is all that counts.
        (128, 500000.0, (16.0, 1.0, 8.0, 4096), (16.0, 1.0, 8.0, 4096)),
        (128, 1e6, (4.0, 2.0, 8.0, 32768), (4.0, 1.0, 4.0, 16384)),
    ],
)
def test_the_scaling_of_llama3_is_found_from_its_effect(tmp_path, head_dim, theta, scaling, found):
    metadata = {"llama.rope.freq_base": theta, "llama.attention.key_length": head_dim}
    factors = {"rope_freqs.weight": rope_freqs(head_dim, theta, *scaling)}
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    expected = dict(zip(keys, found, strict=True)) | {"rope_type": "llama3"}
    assert config(tmp_path, metadata, factors)["rope_scaling"] == expected
    assert list(GgufFile(tmp_path / "m.gguf").shapes()) == ["model.embed_tokens.weight"]


def test_scaling_factors_of_one_are_no_scaling(tmp_path):
    factors = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert config(tmp_path, tensors=factors)["rope_scaling"] is None


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 32), np.full(32, 0.5), np.full(32, 2.0)])
def test_other_scaling_factors_are_refused(tmp_path, factors):
    with pytest.raises(ValueError, match="rope_freqs.weight is not the scaling of Llama 3"):
        config(tmp_path, tensors={"rope_freqs.weight": factors.astype(np.float32)})


def test_two_scalings_at_once_are_refused(tmp_path):
    factors = {"rope_freqs.weight": rope_freqs(HEAD_DIM, 500000.0, 8.0, 1.0, 4.0, 8192)}
    with pytest.raises(ValueError, match="scales its rotary frequencies twice"):
        config(tmp_path, {"llama.rope.scaling.factor": 2.0}, factors)


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path):
    assert GgufFile(write(tmp_path / "m.gguf")).tokenizer() is None


def test_the_tokenizer_is_made_of_the_files_vocabulary(tmp_path):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "<bos>", "<eos>", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = GgufFile(write(tmp_path / "m.gguf", metadata)).tokenizer()
    assert tokenizer.encode("aab<eos>") == [0, 4, 2]


# --- the header ---------------------------------------------------------------------------------

EVERY_KIND = {
    "text": "naïve ▁",
    "whole": 7,
    "real": 0.1,
    "words": ["", "a", "▁b"],
    "reals": [0.5, -1.5],
    "wholes": [1, -2],
    "flags": [True, False],
}


@pytest.mark.parametrize("alignment", [None, 32, 4096])
def test_the_header_is_what_the_reference_reader_reads(tmp_path, alignment):
    _, tensors = model()
    metadata = EVERY_KIND | {"general.alignment": alignment}
    path = write(tmp_path / "m.gguf", metadata, tensors)
    header, reference = read_header(path), GGUFReader(path)
    assert header.metadata == {
        key: field.contents()
        for key, field in reference.fields.items()
        if not key.startswith("GGUF.")
    }
    assert header.tensors == {
        tensor.name: (tuple(reversed(tensor.shape)), tensor.tensor_type, tensor.data_offset)
        for tensor in reference.tensors
    }


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    whole = write(tmp_path / "whole.gguf", EVERY_KIND).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1200, 7), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf is not a GGUF file"):
            GgufFile(cut)


def test_a_damaged_length_is_refused_rather_than_allocated(tmp_path):
    whole = bytearray(write(tmp_path / "m.gguf").read_bytes())
    whole[24:32] = b"\xff" * 8  # the length of the first key
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=r"m.gguf is not a GGUF file that can be read"):
        GgufFile(tmp_path / "m.gguf")


def test_a_file_of_another_format_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(
        ValueError, match=r"model.safetensors is not a GGUF file: it does not begin"
    ):
        GgufFile(path)


def test_a_big_endian_file_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", endianess=GGUFEndian.BIG)
    with pytest.raises(ValueError, match=r"m.gguf is not .* 2 or 3 \(little-endian\)"):
        GgufFile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        GgufFile(tmp_path / "nowhere.gguf")


# --- the real model -----------------------------------------------------------------------------


@pytest.mark.real
def test_the_real_model_is_smollm2(real_file):
    # As in the config.json of HuggingFaceTB/SmolLM2-135M-Instruct.
    expected = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert expected.items() <= real_file.config.items()
    assert sum(map(math.prod, real_file.shapes().values())) == 134_515_008


@pytest.mark.real
@pytest.mark.parity
def test_the_real_tensors_are_bitwise_those_of_transformers(real_file):
    pytest.importorskip("torch", reason="transformers reads GGUF files with torch only")
    from transformers import AutoModelForCausalLM

    path = helpers.smollm2_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    ).state_dict()
    # Tied: transformers has the one matrix by two names.
    assert real_file.shapes().keys() == theirs.keys() - {"lm_head.weight"}
    for name in real_file.shapes():
        np.testing.assert_array_equal(real_file.read(name), theirs[name].numpy(), err_msg=name)
